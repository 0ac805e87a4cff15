"""Power is lost between any two effects on the disk: every state that may be found is one of those that are allowed."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

import ckptsurg

from .power import Disk, Effect, recorded
from .scenes import SCENES, Scene, make


@pytest.fixture(scope="module", params=SCENES)
def recording(request, tmp_path_factory) -> tuple[Scene, Disk, list[Effect], Callable[[], Disk]]:
    """A scene, its rewrite's effects, and a disk on which nothing has happened yet."""
    folder = tmp_path_factory.mktemp("power")
    scene = make(folder / "scene", **SCENES[request.param])
    root = scene.copied_to(folder / "root")
    untouched = folder / "untouched"
    scene.copied_to(untouched)

    def rewrite() -> None:
        ckptsurg.rewrite(root / "spec.json", root / "base", root / scene.out, overwrite=bool(scene.old), jobs=1)

    with pytest.MonkeyPatch.context() as patches:
        effects = recorded(patches, root, rewrite)
    moved = [(name, tuple(_below(untouched, root, one) for one in arguments)) for name, arguments in effects]
    return scene, moved, lambda: Disk(untouched)


def _below(new: Path, old: Path, argument: object) -> object:
    return new / argument.relative_to(old) if isinstance(argument, Path) else argument


def _broken(scene: Scene, disk: Disk, effects: Iterable[Effect]) -> tuple[int, list[str]]:
    """How many states were looked at, and what is wrong with them."""
    rng = random.Random(0)
    states, wrong = 0, []
    seen: set[frozenset[tuple[str, bytes]]] = set()
    effects = list(effects)
    for number in range(len(effects) + 1):
        code = 0 if number == len(effects) else None
        for found in disk.crashes(rng):
            key = frozenset(found.items())
            if code is None and key in seen:
                continue
            seen.add(key)
            states += 1
            wrong += [f"after {effects[:number][-1:]}: {one}" for one in scene.problems(found, code)]
        if code is None:
            name, arguments = effects[number]
            getattr(disk, name)(*arguments)
    return states, wrong


def test_no_state_is_broken(recording, record_property):
    scene, effects, disk = recording
    states, wrong = _broken(scene, disk(), effects)
    record_property("states", states)
    assert not wrong, wrong[:5]
    assert states > len(effects) >= 20


def test_not_one_flush_could_be_left_out(recording):
    """So whoever takes one away hears of it, and none is paid for in vain."""
    scene, effects, disk = recording
    flushes = [number for number, (name, _) in enumerate(effects) if name in ("flush", "flush_folder")]
    idle = [number for number in flushes if not _broken(scene, disk(), effects[:number] + effects[number + 1 :])[1]]
    assert [effects[number] for number in idle] == []
    assert len(flushes) >= 4
