"""Disks that are full or cannot be written to, limits of a process, runs that meet, and files that change meanwhile."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import signal
import stat
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import ckptsurg
from ckptsurg.claiming import claim_beside

from ..filesystems import mounted
from .scenes import REWRITE, SCENES, Scene, contents, make, run

MIB = 1 << 20


def faulty(call: str, fault: str) -> tuple[str, ...]:
    """What a command is run under so that a fault is put into a system call."""
    return ("strace", "-f", "-qq", "-o", "/dev/null", "-e", f"trace={call}", "-e", f"inject={call}:{fault}")


@pytest.fixture(scope="module", params=["file-overwritten", "folder-overwritten"])
def overwriting(request, tmp_path_factory) -> Scene:
    return make(tmp_path_factory.mktemp("scene"), **SCENES[request.param])


@pytest.fixture
def large(tmp_path) -> Path:
    """A base of 2 MiB, and a spec that copies it."""
    (tmp_path / "large" / "base").mkdir(parents=True)
    save_file({"a": torch.ones(MIB // 2), "b": torch.ones(3)}, tmp_path / "large" / "base" / "model.safetensors")
    (tmp_path / "large" / "spec.json").write_text('{"version": 1, "freeze": "**"}')
    return tmp_path / "large"


# --- Disks ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["out", "out.safetensors"])
def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(large, tmp_path, name):
    with mounted(tmp_path / "small", "tmpfs", "size=1m") as small:
        done = run((*REWRITE, "-o", small / name), large)
        assert done.returncode == 4 and "bytes, but the file system has 1,0" in done.stderr
        assert list(small.iterdir()) == []


@pytest.mark.parametrize("inodes", range(2, 9))
def test_a_disk_that_fills_up_meanwhile(overwriting, tmp_path, inodes):
    """Of inodes there are only so many: at each of them in turn it is full."""
    with mounted(tmp_path / "few", "tmpfs", "size=8m") as few:
        folder = overwriting.copied_to(few / "here")
        taken = sum(1 for _ in few.rglob("*")) + 1
        subprocess.run(["mount", "-o", f"remount,nr_inodes={taken + inodes}", few], check=True)
        done = run(overwriting.command, folder)
        assert (done.returncode == 4 and "No space left on device" in done.stderr) or done.returncode == 0
        assert overwriting.problems(contents(folder), done.returncode) == []
        assert overwriting.staged(folder) == []
        subprocess.run(["mount", "-o", "remount,nr_inodes=1000", few], check=True)
        assert overwriting.retried(folder) == []


def test_a_disk_that_cannot_be_written_to(overwriting, tmp_path):
    with mounted(tmp_path / "fixed", "tmpfs", "size=8m") as fixed:
        folder = overwriting.copied_to(fixed / "here")
        subprocess.run(["mount", "-o", "remount,ro", fixed], check=True)
        done = run(overwriting.command, folder)
        assert done.returncode == 4 and "Read-only file system" in done.stderr
        assert contents(folder) == contents(overwriting.before)


def test_a_folder_that_is_not_ours_to_write_in(overwriting, tmp_path):
    folder = overwriting.copied_to(tmp_path / "here")
    folder.chmod(0o555)
    heeding = ("setpriv", "--bounding-set=-dac_override") if os.geteuid() == 0 else ()  # what lets root write anywhere
    done = run((*heeding, *overwriting.command), folder)
    assert done.returncode == 4 and "Permission denied" in done.stderr and "nothing was published" in done.stderr
    assert contents(folder) == contents(overwriting.before)


def test_a_limit_on_the_size_of_files(overwriting, tmp_path):
    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))

    folder = overwriting.copied_to(tmp_path / "here")
    done = run(overwriting.command, folder, preexec_fn=limited)
    assert done.returncode == 4 and "File too large" in done.stderr
    assert overwriting.problems(contents(folder), 4) == overwriting.staged(folder) == []
    assert overwriting.retried(folder) == []


def test_a_quarter_of_the_checkpoint_is_memory_enough(tmp_path):
    size = 2 << 30
    header = json.dumps({"w": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    (tmp_path / "base").mkdir()
    with (tmp_path / "base" / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + size)
    (tmp_path / "spec.json").write_text('{"version": 1, "freeze": "**"}')

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (size // 4, size // 4))

    command = [sys.executable, "-m", "ckptsurg", "manifest", "spec.json", "base", "-o", "all.json", "--jobs", "4"]
    assert run(command, tmp_path, preexec_fn=limited).returncode == 0
    command = [sys.executable, "-m", "ckptsurg", "rewrite", "spec.json", "base", "-o", "out", "--jobs", "4"]
    done = run(command, tmp_path, preexec_fn=limited)
    assert done.returncode == 0, done.stderr
    assert ckptsurg.verify(tmp_path / "all.json", tmp_path / "out").ok
    shutil.rmtree(tmp_path / "out")


# --- Modes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["ext4", "tmpfs", "xfs", "btrfs", "overlay"])
@pytest.mark.parametrize("umask", [0o022, 0o077, 0o027])
def test_modes_follow_the_umask_and_bytes_nothing(overwriting, tmp_path, umask, kind):
    with mounted(tmp_path / "there", kind) as there:
        folder = overwriting.copied_to(there / "here")
        done = run(overwriting.command, folder, umask=umask)
        # The new output is what it is on the file system that the scene was made on.
        assert overwriting.problems(contents(folder), done.returncode) == overwriting.staged(folder) == [], done.stderr
        made = [folder / overwriting.out, *(folder / overwriting.out).rglob("*"), *folder.glob("*.freeze.json")]
        for path in made:
            expected = (0o777 if path.is_dir() else 0o666) & ~umask
            assert stat.S_IMODE(path.stat().st_mode) == expected, path
        assert len(made) > 1 and done.returncode == 0


def test_an_old_output_that_cannot_be_exchanged_stays(tmp_path):
    """A folder below an overlay is another file system's, as in a container's image."""
    scene = make(tmp_path / "scene", **SCENES["folder-overwritten"])
    scene.copied_to(tmp_path / "below")
    with mounted(tmp_path / "over", "overlay") as folder:
        done = run(scene.command, folder)
        assert done.returncode == 4 and "out: the file system cannot exchange two folders; nothing was" in done.stderr
        assert "remove the old output first" in done.stderr
        assert contents(folder) == contents(scene.before)
        shutil.rmtree(folder / "out")
        done = run(scene.command, folder)
        assert scene.problems(contents(folder), done.returncode) == scene.staged(folder) == [], done.stderr


# --- Two at once ------------------------------------------------------------------------------------


def test_a_second_run_to_one_output_is_refused(overwriting, tmp_path):
    folder = overwriting.copied_to(tmp_path / "here")
    claim = claim_beside(folder / overwriting.out)
    done = run(overwriting.command, folder)
    assert done.returncode == 2
    assert f"{overwriting.out}: another run is at work on this output" in done.stderr
    assert "wait until it has ended" in done.stderr
    claim.release()
    assert contents(folder) == contents(overwriting.before)
    assert overwriting.retried(folder) == []


def test_of_runs_that_begin_together_none_spoils_another(overwriting, tmp_path):
    folder = overwriting.copied_to(tmp_path / "here")
    runs = [subprocess.Popen(overwriting.command, cwd=folder, stderr=subprocess.PIPE, text=True) for _ in range(6)]
    ends = [(one.communicate()[1], one.returncode) for one in runs]
    assert any(code == 0 for _, code in ends)
    for said, code in ends:
        assert code == 0 or (code == 2 and "another run is at work" in said), said
    assert overwriting.problems(contents(folder), 0) == overwriting.staged(folder) == []


def test_a_killed_run_is_swept_up(overwriting, tmp_path, caplog):
    folder = overwriting.copied_to(tmp_path / "here")
    claim = claim_beside(folder / overwriting.out)
    (claim.folder / "output").mkdir()
    (claim.folder / "output" / "half").write_bytes(b"half")
    (claim.folder / "output" / "link").symlink_to(folder / "base")
    claim.release()  # as the system does for whoever is killed
    done = run(overwriting.command, folder)
    assert done.returncode == 0 and "removed 2 files that a stopped run left" in done.stderr
    assert overwriting.problems(contents(folder), 0) == overwriting.staged(folder) == []


def test_a_killed_run_gives_the_old_manifest_back(tmp_path):
    """It was taken away before weights were to be replaced, which they were not; and then the next run fails too."""
    scene = make(tmp_path / "scene", **SCENES["file-overwritten"])
    folder = scene.copied_to(tmp_path / "here")
    killed = faulty("rename", "signal=SIGKILL:when=2")
    assert run((*killed, *scene.command), folder).returncode == -9
    assert not (folder / "out.freeze.json").exists()
    failing = faulty("pwrite64", "error=ENOSPC")
    assert run((*failing, *scene.command), folder).returncode == 4
    assert {name: (folder / name).read_bytes() for name in scene.old} == scene.old
    assert scene.retried(folder) == []


def test_what_is_not_ours_is_not_swept_up(overwriting, tmp_path):
    folder = overwriting.copied_to(tmp_path / "here")
    theirs = folder / f".{overwriting.out}.ckptsurg"
    theirs.mkdir()
    (theirs / "thesis.txt").write_text("precious")
    done = run(overwriting.command, folder)
    assert done.returncode == 4 and "in it is what is not: thesis.txt" in done.stderr
    assert (theirs / "thesis.txt").read_text() == "precious"
    (theirs / "thesis.txt").rename(folder / "thesis.txt")
    theirs.rmdir()
    (folder / "thesis.txt").rename(theirs)
    done = run(overwriting.command, folder)
    assert done.returncode == 4 and "is where it would be staged, and is no folder" in done.stderr
    assert theirs.read_text() == "precious"
    theirs.unlink()
    theirs.mkdir()
    (folder / "base").rename(theirs / "output")
    shutil.copytree(theirs / "output", folder / "copy")
    for base, out in ((theirs / "output", "elsewhere"), ("copy", theirs / "mine")):
        command = [str(base) if one == "base" else one for one in REWRITE]
        done = run((*command, "-o", out), folder)
        assert done.returncode == 2 and "ckptsurg is where outputs are staged, and swept" in done.stderr
    assert contents(theirs / "output") == contents(overwriting.before / "base")


def test_where_there_are_no_locks_the_folder_is_the_lock(overwriting, tmp_path):
    folder = overwriting.copied_to(tmp_path / "here")
    lockless = faulty("flock", "error=ENOLCK")
    (folder / f".{overwriting.out}.ckptsurg").mkdir()
    done = run((*lockless, *overwriting.command), folder)
    assert done.returncode == 4 and "whether another run uses it cannot be told" in done.stderr
    (folder / f".{overwriting.out}.ckptsurg").rmdir()
    done = run((*lockless, *overwriting.command), folder)
    assert overwriting.problems(contents(folder), done.returncode) == overwriting.staged(folder) == []


def test_a_child_that_is_forked_neither_keeps_nor_breaks_a_run(overwriting, tmp_path):
    folder = overwriting.copied_to(tmp_path / "here")
    children = []

    def fork(done: int, total: int) -> None:
        if not children:
            children.append(os.fork())
            if not children[0]:
                raise SystemExit  # through the clean-up of the run that it is a copy of

    out = folder / overwriting.out
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forks beside threads
        try:
            ckptsurg.rewrite(folder / "spec.json", folder / "base", out, overwrite=True, jobs=1, progress=fork)
        except SystemExit:
            os._exit(0)
    os.waitpid(children[0], 0)
    assert overwriting.problems(contents(folder), 0) == overwriting.staged(folder) == []


def test_a_place_where_nothing_can_be_made_is_no_endless_search(overwriting, tmp_path):
    folder = overwriting.copied_to(tmp_path / "here")
    done = run((*REWRITE, "-o", "/proc/out"), folder, timeout=20)
    assert done.returncode == 4 and "/proc/out: No such file or directory" in done.stderr


def test_a_disk_without_a_limit_has_room(large, tmp_path):
    with mounted(tmp_path / "endless", "tmpfs", "size=0") as endless:
        assert run((*REWRITE, "-o", endless / "out"), large).returncode == 0


def test_an_earlier_output_with_folders_that_may_not_be_written_to(tmp_path):
    scene = make(tmp_path / "scene", **SCENES["folder-overwritten"])
    folder = scene.copied_to(tmp_path / "here")
    (folder / "out" / "logs").mkdir()
    (folder / "out" / "logs" / "one").touch()
    (folder / "out" / "logs").chmod(0o555)
    heeding = ("setpriv", "--bounding-set=-dac_override") if os.geteuid() == 0 else ()
    done = run((*heeding, *scene.command), folder)
    assert scene.problems(contents(folder), done.returncode) == scene.staged(folder) == []


@pytest.mark.parametrize(("before", "code"), [(signal.SIG_DFL, 129), (signal.SIG_IGN, 0)])
def test_who_ignores_that_the_terminal_is_gone_goes_on(overwriting, tmp_path, before, code):
    """As nohup has it."""
    folder = overwriting.copied_to(tmp_path / "here")
    hung_up = faulty("fsync", "signal=SIGHUP:when=1")
    heeding = {"preexec_fn": lambda: signal.signal(signal.SIGHUP, before)}
    assert run((*hung_up, *overwriting.command), folder, **heeding).returncode == code
    assert overwriting.staged(folder) == []


def test_a_folder_that_appears_meanwhile_is_not_replaced(tmp_path):
    scene = make(tmp_path / "scene", **SCENES["folder"])
    folder = scene.copied_to(tmp_path / "here")

    def meanwhile(done: int, total: int) -> None:
        (folder / "out").mkdir(exist_ok=True)
        (folder / "out" / "thesis.txt").write_text("precious")

    with pytest.raises(ckptsurg.UsageError, match=r"holds no freeze\.json of ckptsurg, so it is not an earlier output"):
        ckptsurg.rewrite(folder / "spec.json", folder / "base", folder / "out", overwrite=True, progress=meanwhile)
    assert contents(folder / "out") == {"thesis.txt": b"precious"} and scene.staged(folder) == []


def test_a_file_inside_an_earlier_output_is_refused(tmp_path):
    """Its own manifest would stand beside one that does not describe it any more."""
    scene = make(tmp_path / "scene", **SCENES["folder-overwritten"])
    folder = scene.copied_to(tmp_path / "here")
    (folder / "spec.json").write_text('{"version": 1, "freeze": "**"}')
    before = contents(folder)
    done = run((*REWRITE, "-o", "out/model-00001-of-00003.safetensors", "--overwrite"), folder)
    assert done.returncode == 2 and "lies in an earlier output, whose freeze.json would not describe it" in done.stderr
    assert contents(folder) == before


def test_an_old_manifest_elsewhere_goes_before_new_weights_come(tmp_path):
    scene = make(tmp_path / "scene", **SCENES["folder"])
    folder = scene.copied_to(tmp_path / "here")
    (folder / "spec.json").rename(folder / "new.json")
    (folder / "spec.json").write_text('{"version": 1, "freeze": "block"}')
    command = (*REWRITE, "-o", "out", "--manifest", "kept/all.json")
    assert run(command, folder).returncode == 0
    (folder / "new.json").rename(folder / "spec.json")
    old = (folder / "kept" / "all.json").read_bytes()
    for call in ("renameat2", "rename"):
        here = tmp_path / call
        shutil.copytree(folder, here)
        for number in (1, 2):
            run((*faulty(call, f"signal=SIGKILL:when={number}"), *command, "--overwrite"), here)
            is_new = (here / "out" / "freeze.json").read_bytes() == scene.new["out/freeze.json"]
            kept = here / "kept" / "all.json"
            assert not (is_new and kept.exists() and kept.read_bytes() == old)


def test_a_manifest_that_appears_meanwhile(tmp_path):
    """The weights have their name by then, and the message says so."""
    scene = make(tmp_path / "scene", **SCENES["file"])
    folder = scene.copied_to(tmp_path / "here")
    slow = faulty("renameat2", "delay_enter=1s:when=2")
    process = subprocess.Popen((*slow, *scene.command), cwd=folder, stderr=subprocess.PIPE, text=True)
    while not (folder / "out.safetensors").exists():
        assert process.poll() is None
    (folder / "out.freeze.json").write_text("{}")
    said = process.communicate()[1]
    assert process.returncode == 2
    assert "appeared while the output was made; the weights are published without it" in said


def test_a_staging_folder_of_another_user_is_not_used(overwriting, tmp_path):
    folder = overwriting.copied_to(tmp_path / "here")
    theirs = folder / f".{overwriting.out}.ckptsurg"
    theirs.mkdir()
    os.chown(theirs, 65534, 65534)
    done = run(overwriting.command, folder)
    assert done.returncode == 4 and "is another user's, who could change what is in it" in done.stderr
    assert theirs.is_dir()


# --- The base ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("deed", "said"),
    [
        ("truncate --size=100 {}", "was cut short while it was read|was changed while it was read"),
        ("printf x | dd of={} bs=1 seek=900 conv=notrunc status=none", "was changed while it was read"),
        # What is held open is read to the end.
        ("cp {0} copy && mv copy {0}", None),
        ("mv {0} moved && ln -s /etc/hostname {0}", None),
    ],
)
def test_a_base_that_changes_while_it_is_read(overwriting, tmp_path, deed, said):
    """By another process, while the run waits for the disk to have its first file."""
    folder = overwriting.copied_to(tmp_path / "here")
    file = sorted((folder / "base").glob("*.safetensors"))[-1]
    waiting = faulty("fsync", "delay_enter=1s:when=1")
    process = subprocess.Popen((*waiting, *overwriting.command), cwd=folder, stderr=subprocess.PIPE, text=True)
    staged = folder / f".{overwriting.out}.ckptsurg" / "output"
    while not any(staged.glob("*.safetensors")):
        assert process.poll() is None
    subprocess.run(deed.format(file), shell=True, cwd=folder, check=True)
    error = process.communicate()[1]
    found = {name: data for name, data in contents(folder).items() if name.startswith("out")}
    if said is None:
        assert process.returncode == 0 and found == overwriting.new, error
    else:
        assert process.returncode == 3 and re.search(said, error), error
        assert found == overwriting.old
    assert overwriting.staged(folder) == []
