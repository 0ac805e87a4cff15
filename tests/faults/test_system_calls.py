"""Real runs, stopped or refused by the system at every call that changes something on the disk."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from .calls import Call, changing_calls, disturbed
from .scenes import SCENES, Scene, contents, make

#: Calls that a run does without, or that only clean up: where they fail it goes on.
DISPENSABLE = {"flock", "ioctl", "rmdir", "sync_file_range", "unlink", "unlinkat"}


@pytest.fixture(scope="module", params=SCENES)
def scene(request, tmp_path_factory) -> Scene:
    return make(tmp_path_factory.mktemp("scene"), **SCENES[request.param])


#: The two in which all calls occur, for what would take long in each.
overwriting = pytest.mark.parametrize("scene", ["file-overwritten", "folder-overwritten"], indirect=True)


@pytest.fixture(scope="module")
def calls(scene, tmp_path_factory) -> list[Call]:
    found = changing_calls(scene, scene.copied_to(tmp_path_factory.mktemp("calls") / "run"))
    assert {"mkdir", "openat", "pwrite64", "fsync", "rename" if scene.is_lone and scene.old else "renameat2"} <= {
        call.name for call in found
    }
    return found


@pytest.fixture
def at_every_call(scene, calls, tmp_path, record_property) -> Callable[..., None]:
    """Put a fault into each call in turn, in a run of its own; ``check`` says what is wrong with how it ended."""

    def run(
        fault: str, check: Callable[[Call, int | None, str, Path], list[str]], wanted: set[str] | None = None
    ) -> None:
        chosen = [call for call in calls if wanted is None or call.name in wanted]
        wrong = []
        for number, call in enumerate(chosen):
            folder = scene.copied_to(tmp_path / str(number))
            code, said = disturbed(scene, folder, call, fault)
            found = [*scene.problems(contents(folder), code), *check(call, code, said, folder), *scene.retried(folder)]
            wrong += [f"{call}: {one}" for one in found]
            shutil.rmtree(folder)
        record_property("points", len(chosen))
        assert not wrong, "\n".join(wrong[:5])
        assert chosen

    return run


def test_killed(at_every_call):
    at_every_call("signal=SIGKILL", lambda call, code, said, folder: [] if code is None else [f"it goes on: {code}"])


@overwriting
@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_asked_to_stop(scene, at_every_call, name, code):
    def check(call: Call, found: int | None, said: str, folder: Path) -> list[str]:
        left = [f"{one} is left" for one in scene.staged(folder)]
        return left + ([] if found == code and "Traceback" not in said else [f"exit code {found}: {said}"])

    at_every_call(f"signal={name}", check)


@overwriting
@pytest.mark.parametrize("error", ["EIO", "ENOSPC", "EDQUOT"])
def test_refused_by_the_system(scene, at_every_call, error):
    def check(call: Call, code: int | None, said: str, folder: Path) -> list[str]:
        if call.name in DISPENSABLE and code == 0:
            return []
        # The earlier output is not taken away before the new one is on disk.
        kept = "holds the earlier output, for the new one may not be on disk" in said
        left = [] if kept or call.name in DISPENSABLE else [f"{one} is left" for one in scene.staged(folder)]
        is_said = code == 4 and len(re.findall(r"^error: .+$", said, re.MULTILINE)) == 1 and "Traceback" not in said
        return left + ([] if is_said else [f"exit code {code}: {said}"])

    at_every_call(f"error={error}", check)


@pytest.mark.parametrize("error", ["EXDEV", "EINVAL"])
def test_a_rename_is_refused(scene, at_every_call, error):
    """Nothing is copied instead. Where only the flags of the rename are not known, there are other ways."""

    def check(call: Call, code: int | None, said: str, folder: Path) -> list[str]:
        return [] if code == 4 or (error == "EINVAL" and code == 0) else [f"exit code {code}: {said}"]

    at_every_call(f"error={error}", check, {"rename", "renameat", "renameat2"})


@overwriting
def test_interrupted_calls_are_made_again(at_every_call):
    """Where Linux may interrupt them; where it never does, an error is an error."""

    def check(call: Call, code: int | None, said: str, folder: Path) -> list[str]:
        again = call.name in DISPENSABLE | {"openat", "pwrite64", "fsync"}
        return [] if code == (0 if again else 4) else [f"exit code {code}: {said}"]

    at_every_call("error=EINTR", check)


def test_a_failed_flush_is_not_tried_again(scene, calls, tmp_path):
    """It would succeed, though what was to be written is lost."""
    for call in (one for one in calls if one.name == "fsync"):
        folder = scene.copied_to(tmp_path / str(call.number))
        assert disturbed(scene, folder, call, "error=EIO")[0] == 4
        lines = (tmp_path / f"{call.number}.strace").read_text().splitlines()
        [failed] = (number for number, line in enumerate(lines) if "INJECTED" in line)
        file = re.search(r"fsync\(\d+<(.*?)>", lines[failed])[1]
        assert Path(file).is_dir() or not any(f"<{file}>" in line for line in lines[failed + 1 :])
        shutil.rmtree(folder)


@overwriting
@pytest.mark.parametrize("taken", [0, 1, 7])
def test_short_writes_are_completed(at_every_call, taken):
    """The system says that it took less than it was given; here it took nothing at all."""

    def check(call: Call, code: int | None, said: str, folder: Path) -> list[str]:
        return [] if code == 0 else [f"exit code {code}: {said}"]

    at_every_call(f"retval={taken}", check, {"pwrite64"})
