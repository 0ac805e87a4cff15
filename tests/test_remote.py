"""Checkpoints on other machines: the same answers as here, of headers and the ranges that are wanted alone."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
import threading
from base64 import b64encode
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import aiohttp
import boto3
import fsspec
import numpy as np
import pytest
from fsspec.config import conf
from moto.server import ThreadedMotoServer
from safetensors.numpy import load, save

import ckptsurg
from ckptsurg import journal
from ckptsurg.formats.ranges import HEAD_BYTES
from ckptsurg.urls import URL

from .serving import Served, serving

ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"
LENGTH = 8


def tensors(*names: str, size: int = 1000) -> dict[str, np.ndarray]:
    return {name: np.random.default_rng(abs(len(name))).random((size, 3), np.float32) for name in names}


LAYERS = tensors(*(f"layers.{number}.weight" for number in range(12)), "head.weight", "head.bias")
FILE = save(LAYERS, {"format": "pt"})
HEADER = LENGTH + int.from_bytes(FILE[:LENGTH], "little")
#: 50 MB, of which nearly all is one tensor.
LARGE = save({"body": np.zeros(12_500_000, np.float32), "head": np.arange(9, dtype=np.float32)})


def folder(*, index: object = None) -> dict[str, bytes]:
    """A model folder with two shards."""
    first, second = tensors("a", "b.c"), tensors("d")
    weight_map = {**dict.fromkeys(first, ONE), **dict.fromkeys(second, TWO)}
    total = sum(one.nbytes for one in (*first.values(), *second.values()))
    index = index or {"metadata": {"total_size": total}, "weight_map": weight_map}
    return {ONE: save(first), TWO: save(second), INDEX: json.dumps(index).encode(), "config.json": b"{}"}


def written(files: dict[str, bytes], place: Path) -> Path:
    for name, content in files.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(content)
    return place


@pytest.fixture
def server() -> Iterator[Served]:
    with serving() as served:
        yield served


@pytest.fixture(autouse=True)
def _logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "ckptsurg")


def fetched(caplog: pytest.LogCaptureFixture) -> str:
    """What was said last of the bytes that were fetched."""
    return [one.getMessage() for one in caplog.records if ": fetched " in one.getMessage()][-1]


def refusal(url: str, kind: type[ckptsurg.CkptsurgError]) -> str:
    """The message in which a checkpoint is refused, of the error's own kind."""
    with pytest.raises(kind) as caught:
        ckptsurg.inspect(url)
    assert str(caught.value).isprintable()
    assert caught.value.exit_code == kind.exit_code
    return str(caught.value)


def bytes_of(place: str | Path) -> dict[str, bytes]:
    with ckptsurg.open_checkpoint(place) as checkpoint:
        return {name: b"".join(map(bytes, checkpoint.read(name))) for name in checkpoint.tensors}


# --- What is fetched --------------------------------------------------------------------------------


def test_the_header_of_fifty_megabytes_takes_one_request(server, caplog):
    server.files["large.safetensors"] = LARGE
    inspection = ckptsurg.inspect(f"{server.url}/large.safetensors")
    assert inspection.tensors["body"].shape == (12_500_000,)
    assert server.asked == [("large.safetensors", (0, HEAD_BYTES))]
    assert server.sent == HEAD_BYTES < 1_000_000
    assert fetched(caplog) == f"{server.url}/large.safetensors: fetched 131.1 kB of 50.0 MB in 1 request"


def test_a_long_header_takes_two_requests_and_not_a_byte_of_the_tensors(server):
    raw = save({f"a.tensor.with.a.long.name.{number}": np.zeros(50, np.float32) for number in range(3000)})
    header = LENGTH + int.from_bytes(raw[:LENGTH], "little")
    assert header > HEAD_BYTES
    server.files["long.safetensors"] = raw
    assert len(ckptsurg.inspect(f"{server.url}/long.safetensors").tensors) == 3000
    assert server.of("long.safetensors") == [(0, HEAD_BYTES), (HEAD_BYTES, header)]
    assert server.sent == header


def test_verify_only_fetches_that_tensor_and_the_header(server, caplog, tmp_path):
    server.files["large.safetensors"] = LARGE
    (tmp_path / "large.safetensors").write_bytes(LARGE)
    manifest = ckptsurg.make_manifest("**", tmp_path / "large.safetensors")
    assert ckptsurg.verify(manifest, f"{server.url}/large.safetensors", only="head").ok
    assert server.of("large.safetensors") == [(0, HEAD_BYTES), (len(LARGE) - 36, len(LARGE))]
    assert server.sent == HEAD_BYTES + 36
    assert "fetched 131.1 kB of 50.0 MB in 2 requests" in fetched(caplog)


def test_neighbours_that_are_both_wanted_come_with_one_request(server, tmp_path):
    server.files["model.safetensors"] = FILE
    (tmp_path / "model.safetensors").write_bytes(FILE)
    manifest = ckptsurg.make_manifest("**", tmp_path / "model.safetensors")
    assert ckptsurg.verify(manifest, f"{server.url}/model.safetensors", only="layers", jobs=1).ok
    wanted = server.of("model.safetensors")[1:]
    assert len(wanted) == 1
    assert wanted[0][1] - wanted[0][0] == 12 * 12_000


def test_a_large_tensor_comes_in_parts_each_byte_once(server, tmp_path):
    server.files["large.safetensors"] = LARGE
    (tmp_path / "large.safetensors").write_bytes(LARGE)
    manifest = ckptsurg.make_manifest("**", tmp_path / "large.safetensors")
    assert ckptsurg.verify(manifest, f"{server.url}/large.safetensors", jobs=3).ok
    header = LENGTH + int.from_bytes(LARGE[:LENGTH], "little")
    parts = sorted(server.of("large.safetensors")[1:])
    assert parts[0][0] == header
    assert parts[-1][1] == len(LARGE)
    assert all(one[1] == two[0] for one, two in pairwise(parts))
    assert max(stop - start for start, stop in parts) <= 4 << 20


def test_a_plan_is_that_of_the_same_file_here_and_takes_the_header(server, tmp_path):
    server.files["model.safetensors"] = FILE
    (tmp_path / "model.safetensors").write_bytes(FILE)
    spec = {"version": 1, "freeze": ["**", "!head"], "drop": "head.bias"}
    plan = ckptsurg.plan(spec, f"{server.url}/model.safetensors")
    assert plan.to_json() == ckptsurg.plan(spec, tmp_path / "model.safetensors").to_json()
    assert server.asked == [("model.safetensors", (0, HEAD_BYTES))]


def test_diff_and_a_baseline_read_both_sides_wherever_they_are(server, tmp_path):
    changed = {**LAYERS, "head.bias": LAYERS["head.bias"] + 1}
    server.files |= {"a.safetensors": FILE, "b.safetensors": save(changed)}
    (tmp_path / "a.safetensors").write_bytes(FILE)
    manifest = ckptsurg.make_manifest("**", tmp_path / "a.safetensors")
    for one in (f"{server.url}/a.safetensors", tmp_path / "a.safetensors"):
        report = ckptsurg.diff(one, f"{server.url}/b.safetensors")
        assert [difference.name for difference in report.tensors] == ["head.bias"]
        report = ckptsurg.verify(manifest, f"{server.url}/b.safetensors", baseline=one)
        assert [(one.name, one.detail.elements_changed) for one in report.drifted] == [("head.bias", 3000)]


# --- Where it is ------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["", f"/{INDEX}"])
def test_shards_elsewhere_are_what_they_are_here(server, tmp_path, place):
    server.files = {f"org/model/{name}": content for name, content in folder().items()}
    local = written(folder(), tmp_path)
    url = f"{server.url}/org/model{place}"
    assert ckptsurg.inspect(url).to_json() == ckptsurg.inspect(f"{local}{place}").to_json()
    assert bytes_of(url) == bytes_of(local)


def test_a_folder_may_hold_one_file(server):
    server.files["model.safetensors"] = FILE
    assert bytes_of(server.url) == bytes_of(f"{server.url}/model.safetensors")


def test_what_is_in_memory_and_in_a_file_is_read_by_its_url(tmp_path, caplog):
    filesystem = fsspec.filesystem("memory")
    filesystem.pipe({f"/m/{name}": content for name, content in folder().items()})
    try:
        local = written(folder(), tmp_path)
        assert bytes_of("memory://m") == bytes_of(local)
        assert ckptsurg.inspect("memory://m").to_json() == ckptsurg.inspect(local).to_json()
        assert "memory://m: fetched" in fetched(caplog)
        assert bytes_of(f"file://{local}") == bytes_of(local)
        assert bytes_of(URL(f"file://{local}/{ONE}")) == bytes_of(local / ONE)
    finally:
        filesystem.rm("/m", recursive=True)


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """The endpoint of an S3 on this machine."""
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(s3, monkeypatch):
    for name, value in {"ENDPOINT_URL": s3, "ACCESS_KEY_ID": "key", "SECRET_ACCESS_KEY": "secret"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    created = boto3.resource("s3").create_bucket(Bucket="models")
    yield created
    created.objects.delete()


def test_s3_is_read_by_ranges(bucket, caplog, tmp_path):
    bucket.put_object(Key="org/large.safetensors", Body=LARGE)
    (tmp_path / "large.safetensors").write_bytes(LARGE)
    manifest = ckptsurg.make_manifest("**", tmp_path / "large.safetensors")
    ckptsurg.inspect("s3://models/org/large.safetensors")
    assert fetched(caplog) == "s3://models/org/large.safetensors: fetched 131.1 kB of 50.0 MB in 2 requests"
    assert ckptsurg.verify(manifest, "s3://models/org/large.safetensors", only="head").ok
    assert "fetched 131.1 kB of 50.0 MB in 4 requests" in fetched(caplog)


def test_s3_has_folders_and_says_what_is_not_there(bucket, tmp_path):
    for name, content in folder().items():
        bucket.put_object(Key=f"org/{name}", Body=content)
    assert bytes_of("s3://models/org/") == bytes_of(written(folder(), tmp_path))
    assert refusal("s3://models/org/x.safetensors", ckptsurg.UsageError) == (
        "s3://models/org/x.safetensors: no such file"
    )
    assert "no such file" in refusal("s3://nowhere/x.safetensors", ckptsurg.UsageError)
    assert "s3://models/none: no checkpoint in this folder" in refusal("s3://models/none", ckptsurg.UsageError)


def test_an_object_of_s3_that_is_replaced_is_noticed(bucket):
    bucket.put_object(Key="a.safetensors", Body=FILE)
    checkpoint = ckptsurg.open_checkpoint("s3://models/a.safetensors")
    bucket.put_object(Key="a.safetensors", Body=FILE[:-1] + b"x")
    with pytest.raises(ckptsurg.CheckpointError, match=r"s3://models/a.safetensors: was changed while it was read"):
        b"".join(map(bytes, checkpoint.read("head.bias")))
    checkpoint.close()


READ_FROM_HUB = """
import sys
import ckptsurg
from ckptsurg import journal

ckptsurg.verify(sys.argv[1], "hf://org/model", only="head.bias").raise_if_changed()
try:
    ckptsurg.inspect("hf://org/none/model.safetensors")
except ckptsurg.UsageError as error:
    print(error)
"""


def test_the_hub_is_read_by_ranges(server, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(FILE)
    manifest = tmp_path / "freeze.json"
    ckptsurg.write_manifest(ckptsurg.make_manifest("**", tmp_path / "model.safetensors"), manifest)
    api, place = "api/models/org/model", "org/model/resolve/main/model.safetensors"
    listed = [{"type": "file", "path": "model.safetensors", "size": len(FILE), "oid": "0" * 40}]
    repository = json.dumps({"id": "org/model", "sha": "0" * 40, "siblings": []}).encode()
    server.files = {api: repository, f"{api}/tree/main": json.dumps(listed).encode(), place: FILE}
    server.lies = {"X-Error-Code": "RepoNotFound"}  # of a 404, how the hub says what is not there
    environment = {**os.environ, "HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "hub")}
    line = [sys.executable, "-c", READ_FROM_HUB, manifest]
    done = subprocess.run(line, capture_output=True, text=True, check=False, env=environment)
    assert (done.stdout, done.returncode) == ("hf://org/none/model.safetensors: no such file\n", 0), done.stderr
    [head, tensor] = server.of(place)
    assert head == (0, HEAD_BYTES)
    assert tensor[1] - tensor[0] == 12_000


# --- What may go wrong ------------------------------------------------------------------------------


def test_a_server_that_knows_no_ranges_is_not_read(server):
    server.files["large.safetensors"] = LARGE
    server.knows_ranges = False
    message = refusal(f"{server.url}/large.safetensors", ckptsurg.UsageError)
    assert "the server sends the whole file where a part of it is asked for, which is not read" in message
    assert "hint: download it, and give its path" in message
    assert server.sent < len(LARGE) // 2  # what was under way


def test_a_connection_that_breaks_is_tried_again_and_then_given_up(server):
    server.files["model.safetensors"] = FILE
    server.cuts = 2
    assert len(ckptsurg.inspect(f"{server.url}/model.safetensors").tensors) == 14
    server.cuts = 99
    message = refusal(f"{server.url}/model.safetensors", ckptsurg.SystemFailure)
    assert message.startswith(f"{server.url}/model.safetensors: cannot be fetched: the connection failed")


def test_a_server_that_is_busy_is_asked_again(server):
    server.files["model.safetensors"] = FILE
    server.statuses = [503, 429]
    assert len(ckptsurg.inspect(f"{server.url}/model.safetensors").tensors) == 14
    server.statuses = [503] * 9
    message = refusal(f"{server.url}/model.safetensors", ckptsurg.SystemFailure)
    assert "the server answers 503 Service Unavailable" in message


def test_a_file_that_is_replaced_is_noticed_by_the_next_answer(server):
    server.files["a.safetensors"] = FILE
    with ckptsurg.open_checkpoint(f"{server.url}/a.safetensors") as checkpoint:
        server.files["a.safetensors"] = FILE[:-1] + b"x"
        with pytest.raises(ckptsurg.CheckpointError, match=r"/a.safetensors: was changed while it was read"):
            list(checkpoint.read("layers.0.weight"))
        server.files["a.safetensors"] = FILE[:100]  # of which there is no such range
        with pytest.raises(ckptsurg.CheckpointError, match="was changed while it was read"):
            list(checkpoint.read("layers.0.weight"))


@pytest.mark.parametrize(
    ("says", "is_replaced", "keeps"), [(True, False, True), (True, True, False), (False, False, False)]
)
def test_a_stopped_rewrite_goes_on_if_the_server_says_that_the_file_is_the_same(
    server, caplog, tmp_path, monkeypatch, says, is_replaced, keeps
):
    monkeypatch.setattr(journal, "_SAID_EVERY", 1)
    if not says:
        server.lies = {"ETag": "", "Last-Modified": ""}
    base, old = f"{server.url}/base.safetensors", {f"layers.{number}": np.full(5000, number) for number in range(40)}
    server.files["base.safetensors"] = save(old)
    arguments = {"spec": {"version": 1, "freeze": "**"}, "ckpt": base, "out": tmp_path / "out", "resume": True}

    def stop(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ckptsurg.rewrite(**arguments, jobs=1, progress=stop)
    if is_replaced:
        server.files["base.safetensors"] = save({name: values + 1 for name, values in old.items()})
    caplog.clear()
    ckptsurg.rewrite(**arguments)
    assert ("kept" in caplog.text) == keeps
    written = (tmp_path / "out" / "model.safetensors").read_bytes()
    assert load(written).keys() == old.keys()
    assert all(
        each.tobytes() == load(server.files["base.safetensors"])[name].tobytes() for name, each in load(written).items()
    )


def test_a_file_that_is_replaced_is_noticed_at_the_end_where_no_answer_says_so():
    filesystem = fsspec.filesystem("memory")
    filesystem.pipe("/a.safetensors", FILE)
    try:
        with (
            pytest.raises(ckptsurg.CheckpointError, match=r"memory://a.safetensors: was changed while it was read"),
            ckptsurg.open_checkpoint("memory://a.safetensors") as checkpoint,
        ):
            list(checkpoint.read("head.bias"))
            filesystem.pipe("/a.safetensors", FILE[:-1] + b"x")
    finally:
        filesystem.rm("/a.safetensors")


@pytest.mark.parametrize("header", ["bytes 8-1007/5000", "bytes 0-9/5000", "bytes 0-1/2", "items 0-1/*", ""])
def test_an_answer_that_is_another_range_is_refused(server, header):
    server.files["a.safetensors"] = FILE
    server.lies = {"Content-Range": header}
    assert "the server sends" in refusal(f"{server.url}/a.safetensors", ckptsurg.SystemFailure)


def test_a_server_that_does_not_answer_is_left(server, monkeypatch):
    server.files["model.safetensors"] = FILE
    server.silent = threading.Event()
    monkeypatch.setitem(conf, "http", {"client_kwargs": {"timeout": aiohttp.ClientTimeout(total=0.1)}})
    message = refusal(f"{server.url}/model.safetensors", ckptsurg.SystemFailure)
    assert message == f"{server.url}/model.safetensors: cannot be fetched: the server does not answer in time"


@pytest.mark.parametrize("status", [401, 403])
def test_what_may_not_be_read_is_a_failure_of_the_system(server, status):
    server.files["model.safetensors"] = FILE
    server.statuses = [status] * 9
    message = refusal(f"{server.url}/model.safetensors", ckptsurg.SystemFailure)
    assert f"access is denied ({status} " in message
    assert "access is denied" in refusal(server.url, ckptsurg.SystemFailure)


def test_a_folder_whose_server_denies_what_is_not_there_is_read(server):
    server.files["model.safetensors"] = FILE
    server.statuses = [403]
    assert len(ckptsurg.inspect(server.url).tensors) == 14


def test_what_is_not_there_is_bad_usage(server):
    assert refusal(f"{server.url}/x.safetensors", ckptsurg.UsageError) == f"{server.url}/x.safetensors: no such file"
    assert refusal(f"{server.url}/{INDEX}", ckptsurg.UsageError) == f"{server.url}/{INDEX}: no such file"
    message = refusal(f"{server.url}/org/model", ckptsurg.UsageError)
    assert f"{server.url}/org/model: no checkpoint in this folder: expected model.safetensors or {INDEX}" in message
    for name, content in folder().items():
        server.files[name] = content
    del server.files[TWO]
    assert f'{INDEX}: the shard "{TWO}" is missing' in refusal(server.url, ckptsurg.CheckpointError)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "expected at least 8 bytes, found 0"),
        (b"<!doctype html><html></html>", "is an HTML page"),
        (FILE[:-5], "the file is cut short: expected"),
        ((9999).to_bytes(8, "little") + FILE[8:40], "the header should have 9,999 bytes, but the file has 32 after"),
        (FILE.replace(b'"F32"', b'"X99"', 1), "unknown dtype"),
    ],
    ids=["empty", "page", "cut", "cut-in-header", "dtype"],
)
def test_a_bad_file_is_refused_as_one_here_is(server, content, said):
    server.files["a.safetensors"] = content
    message = refusal(f"{server.url}/a.safetensors", ckptsurg.CheckpointError)
    assert message.startswith(f"{server.url}/a.safetensors: ")
    assert said in message


@pytest.mark.parametrize(
    "name",
    ["../x.safetensors", "/x.safetensors", "a/../../x.safetensors", "..%2fx.safetensors", "x.safetensors?a.safetensors",
     "a@b/x.safetensors", "http://other/x.safetensors", "x#.safetensors", "*.safetensors"],
)  # fmt: skip
def test_the_name_of_a_shard_does_not_lead_elsewhere(server, name):
    server.files = {"x.safetensors": FILE, f"m/{INDEX}": json.dumps({"weight_map": {"head.bias": name}}).encode()}
    assert "shard name" in refusal(f"{server.url}/m", ckptsurg.CheckpointError)
    assert [path for path, _ in server.asked if "x.safetensors" in path] == []


def test_a_folder_with_two_checkpoints_is_refused(server):
    server.files = {**folder(), "model.safetensors": FILE}
    message = refusal(server.url, ckptsurg.CheckpointError)
    assert f"holds both model.safetensors and {INDEX}; which one is meant?" in message


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("http:///x.safetensors", "http:///x.safetensors: is no URL"),
        ("http://[::1/x.safetensors", "http://[::1/x.safetensors: is no URL"),
        ("http://host:99999/x.safetensors", "http://host:99999/x.safetensors: is no URL"),
        ("tape://x", "tape://x: tape:// is not known; there are s3, https, hf, and others that fsspec knows"),
        ("s3://models/a.pt", "s3://models/a.pt: of what is on another machine only safetensors is read"),
    ],
)
def test_what_cannot_be_read_says_so(url, said):
    assert said in refusal(url, ckptsurg.UsageError)


def test_a_path_that_was_a_url_is_told_from_one():
    message = refusal(Path("s3://models/a.safetensors"), ckptsurg.UsageError)
    assert "hint: a URL is given as text; a Path takes it apart" in message


# --- What is shown ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://user:pass@host:80/a/b?X-Amz-Signature=secret#x", "https://host:80/a/b?…"),
        ("https://token@host/a", "https://host/a"),
        ("s3://KEY:se/cr+et@bucket/a@b", "s3://bucket/a@b"),
        ("https://host:8000/a@b", "https://host:8000/a@b"),
        ("hf://org/model@main/a", "hf://org/model@main/a"),
        ("abfs://container@account/a", "abfs://container@account/a"),
    ],
)
def test_a_url_is_shown_without_what_is_secret(url, shown):
    assert str(URL(url)) == f"{URL(url)}" == shown
    assert repr(URL(url)) == f"URL('{shown}')"


def command(*arguments: str | Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "ckptsurg", *map(str, arguments)]
    done = subprocess.run(line, capture_output=True, text=True, timeout=30, env={**os.environ, "NO_COLOR": "1"})
    assert done.returncode == code, done.stderr
    return done


def test_commands_take_urls_and_never_show_what_is_secret_in_them(server, tmp_path):
    server.files["m/model.safetensors"] = FILE
    manifest, spec = tmp_path / "freeze.json", tmp_path / "spec.yaml"
    spec.write_text('version: 1\nfreeze: "**"\n')
    host = server.url.removeprefix("http://")
    url = f"http://us3r:pa55@{host}/m/model.safetensors?X-Amz-Signature=53cr3t"
    shown = f"{server.url}/m/model.safetensors?…"
    said = [
        command("inspect", url),
        command("plan", spec, url, "--json"),
        command("manifest", spec, url, "-o", manifest),
        command("verify", manifest, url, "--only", "head"),
        command("diff", url, url, "--json"),
        command("inspect", url.replace("m/model", "none"), code=2),
        command("inspect", url.replace(host, "127.0.0.1:1"), code=4),
        command("rewrite", spec, url, "-o", url, code=2),
    ]
    assert server.headers["Authorization"] == f"Basic {b64encode(b'us3r:pa55').decode()}"
    assert said[0].stderr == f"{shown}: fetched 131.1 kB of 169.2 kB in 1 request\n"
    assert said[5].stderr == f"error: {server.url}/none.safetensors?…: no such file\n"
    assert said[7].stderr.startswith(f"error: {shown}: expected a path; only a checkpoint that is read may be on")
    for one in said:
        assert not re.search("us3r|pa55|53cr3t", one.stdout + one.stderr)


# --- What is made of it -----------------------------------------------------------------------------


@pytest.mark.parametrize("out", ["out.safetensors", "out"])
def test_a_rewrite_of_a_file_elsewhere_has_the_bytes_of_one_here(server, tmp_path, out):
    server.files["model.safetensors"] = FILE
    (tmp_path / "model.safetensors").write_bytes(FILE)
    spec = {"version": 1, "freeze": ["**", "!head"], "reinit": [{"match": "head.weight", "init": "zeros"}]}
    spec["freeze"] = ["**", "!head.weight"]
    for base, place in ((f"{server.url}/model.safetensors", "there"), (tmp_path / "model.safetensors", "here")):
        ckptsurg.rewrite(spec, base, tmp_path / place / out)
        ckptsurg.convert(base, tmp_path / place / "converted" / out)
    made = {path.relative_to(tmp_path / "here"): path.read_bytes() for path in (tmp_path / "here").rglob("*.*")}
    assert len(made) == 3
    assert made == {
        path.relative_to(tmp_path / "there"): path.read_bytes() for path in (tmp_path / "there").rglob("*.*")
    }


def test_a_manifest_of_what_is_elsewhere_is_that_of_what_is_here(server, tmp_path):
    server.files = folder()
    manifest = ckptsurg.make_manifest(["**", "!d"], server.url)
    assert manifest.to_bytes() == ckptsurg.make_manifest(["**", "!d"], written(folder(), tmp_path)).to_bytes()


def test_a_statement_of_a_file_elsewhere_is_that_of_one_here(server, tmp_path):
    server.files["model.safetensors"] = FILE
    (tmp_path / "model.safetensors").write_bytes(FILE)
    manifest = ckptsurg.make_manifest("**", tmp_path / "model.safetensors")
    there = ckptsurg.attest(manifest, f"{server.url}/model.safetensors")
    assert there == ckptsurg.attest(manifest, tmp_path / "model.safetensors")


def test_of_a_folder_elsewhere_the_weights_alone_are_taken_when_they_are_asked_for(server, tmp_path):
    server.files = folder()
    spec = {"version": 1, "freeze": "**"}
    with pytest.raises(ckptsurg.UsageError) as caught:
        ckptsurg.rewrite(spec, server.url, tmp_path / "out")
    assert str(caught.value) == (
        f"{server.url}: is not on this machine: of a model folder there, only the weights are fetched "
        "(hint: download it and give its path; an output that ends in .safetensors takes the weights alone)"
    )
    assert not (tmp_path / "out").exists()
    ckptsurg.rewrite(spec, server.url, tmp_path / "out.safetensors")
    assert bytes_of(tmp_path / "out.safetensors") == bytes_of(server.url)


def test_a_base_that_changes_while_it_is_rewritten_gives_nothing(server, tmp_path):
    server.files["model.safetensors"] = FILE
    base = ckptsurg.open_checkpoint(f"{server.url}/model.safetensors")
    server.files["model.safetensors"] = FILE[:-1] + b"x"
    with base, pytest.raises(ckptsurg.CheckpointError, match="was changed while it was read"):
        ckptsurg.rewrite({"version": 1, "freeze": "**"}, base, tmp_path / "out.safetensors")
    assert not any(tmp_path.iterdir())


def test_nothing_of_what_is_here_stands_for_what_is_elsewhere(server, tmp_path, monkeypatch):
    server.files["model.safetensors"] = FILE
    monkeypatch.chdir(tmp_path)
    Path("model.safetensors").write_bytes(FILE[:-1] + b"x")  # of the same name, in the working directory
    spec = {"version": 1, "freeze": "**"}
    ckptsurg.rewrite(spec, f"{server.url}/model.safetensors", "out", link=True)
    assert bytes_of("out") == bytes_of(f"{server.url}/model.safetensors")
    with pytest.raises(ckptsurg.UsageError, match="has no manifest that could be trusted"):
        ckptsurg.make_manifest(spec, server.url, trust_base_manifest=True)
    Path("empty").mkdir()
    monkeypatch.chdir("empty")
    ckptsurg.rewrite(spec, f"{server.url}/model.safetensors", ".")
    assert bytes_of(tmp_path / "empty") == bytes_of(tmp_path / "out")


def test_what_is_written_is_written_here(tmp_path):
    for write in (
        lambda: ckptsurg.rewrite({"version": 1, "freeze": "**"}, tmp_path, "s3://models/out"),
        lambda: ckptsurg.plan("https://host/spec.yaml", tmp_path),
        lambda: ckptsurg.verify("https://host/freeze.json", tmp_path),
    ):
        (tmp_path / "model.safetensors").write_bytes(FILE)
        with pytest.raises(ckptsurg.UsageError, match=r"^(s3|https)://.*: expected a path; only a checkpoint that"):
            write()


# --- What is imported -------------------------------------------------------------------------------


def imported(code: str) -> set[str]:
    script = f"import sys\n{code}\nprint(*{{name.partition('.')[0] for name in sys.modules}})"
    return set(
        subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    )


def test_what_is_here_needs_no_fsspec(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(FILE)
    fetching = {"fsspec", "aiohttp", "s3fs", "huggingface_hub"}
    assert not imported(f"import ckptsurg, ckptsurg.cli.commands; ckptsurg.inspect({str(tmp_path)!r})") & fetching


@pytest.mark.parametrize(
    ("package", "url"),
    [("fsspec", "s3://a/b"), ("s3fs", "s3://a/b"), ("aiohttp", "https://a/b"), ("huggingface_hub", "hf://a/b")],
)
def test_a_package_that_is_missing_is_named_with_what_installs_it(package, url):
    script = (
        f"import sys; sys.modules[{package!r}] = None\nimport ckptsurg\n"
        f"try:\n    ckptsurg.inspect({url!r})\nexcept ckptsurg.UsageError as error:\n    print(error)"
    )
    said = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert said.startswith(f"{url}: ")
    assert package in said
    assert "(hint: pip install 'ckptsurg[remote]')" in said
