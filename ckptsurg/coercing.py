"""Paths or objects: what the public functions take, made into what the library works on.

What only some of them need (numpy, YAML, frameworks) is imported where it is used.
"""

from __future__ import annotations

import importlib
import os
import re
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, cast

from .checkpoints import Checkpoint
from .errors import SpecError, UsageError
from .formats import NO_MODEL, is_keras_file, open_checkpoint, open_trained
from .parallel import MOST_JOBS, available_jobs
from .ranks import ALONE, Ranks
from .tensors import ALGORITHMS, TensorSource
from .urls import URL, as_url
from .wording import enumerate_names, shown

if TYPE_CHECKING:
    import torch
    from torch.distributed import ProcessGroup

    from .manifest import Manifest
    from .plans import Plan
    from .spec import Spec

__all__ = [
    "GroupLike",
    "ManifestLike",
    "PathLike",
    "PlaceLike",
    "SpecLike",
    "TensorsLike",
    "as_algorithm",
    "as_builder",
    "as_donors",
    "as_jobs",
    "as_manifest",
    "as_path",
    "as_patterns",
    "as_place",
    "as_ranks",
    "as_size",
    "as_spec",
    "as_spec_or_patterns",
    "as_target",
    "checkpoint_of",
    "donors_of",
    "is_keras",
    "is_model",
    "opened_with",
    "tensors_of",
]

PathLike: TypeAlias = "str | os.PathLike[str]"
#: Of a checkpoint, which may be on another machine.
PlaceLike: TypeAlias = "PathLike | URL"
#: Where a plan is carried out, also one that was kept.
SpecLike: TypeAlias = "PathLike | Spec | Plan | Mapping[str, Any]"
ManifestLike: TypeAlias = "PathLike | Manifest"
#: A checkpoint, by path or URL or opened; a live model; a state dict.
TensorsLike: TypeAlias = "PlaceLike | TensorSource | torch.nn.Module | Mapping[str, torch.Tensor]"
#: Processes that do one job together; None for this one alone.
GroupLike: TypeAlias = "ProcessGroup | Ranks | None"


def as_path(given: object) -> Path:
    """A path.

    Raises:
        UsageError: if it is no text, or no text that a path can be.
    """
    if (url := as_url(given)) is not None:
        raise UsageError(f"{url}: expected a path; only a checkpoint that is read may be on another machine")
    if not isinstance(given, str | os.PathLike):
        raise UsageError(f"expected a path, found {shown(type(given).__name__)} {shown(given, 60)}")
    if "\0" in os.fspath(given):
        raise UsageError(f"{shown(given)}: a path has no NUL in it")
    return Path(given)


def as_place(given: object) -> Path | URL:
    """Where a checkpoint is: a path, or a URL.

    Raises:
        UsageError: if it is neither.
    """
    return as_url(given) or as_path(given)


def as_target(given: object) -> Path:
    """The path of an output, which has a name of its own."""
    target = as_path(given)
    return target.resolve() if target.name in ("", "..") else target


def as_spec(given: SpecLike, source: TensorSource, donors: Mapping[str, TensorSource] | None = None) -> Spec:
    """A spec; where it is not valid, what else is wrong with it for this source is reported with it."""
    from .parsing import Text
    from .spec import Spec, read_spec

    if isinstance(given, Spec):
        return given
    text = Text("spec", dict(given)) if isinstance(given, Mapping) else read_spec(as_path(given))
    try:
        return Spec.from_text(text)
    except SpecError as error:
        problems = list(error.problems)
    if (rest := Spec.repaired(text)) is not None:
        from . import planning

        try:
            planning.plan(rest, source, donors)
        except SpecError as error:
            problems += error.problems
    raise SpecError(text.label, problems)


def as_spec_or_patterns(given: SpecLike | Iterable[str | Mapping[str, Any]], source: TensorSource) -> Spec:
    """A text is a path if it has the ending of a document or is the name of a file; else it is a pattern."""
    from .spec import Spec

    if isinstance(given, str) and not given.endswith((".yaml", ".yml", ".json")) and not _is_file(given):
        return Spec.of_patterns(given)
    if isinstance(given, str | os.PathLike | Spec | Mapping):
        return as_spec(given, source)
    if not isinstance(given, Iterable):
        raise UsageError(f"expected a spec, its path or patterns, found {shown(type(given).__name__)}")
    return Spec.of_patterns(given)


def _is_file(text: str) -> bool:
    try:
        return Path(text).is_file()
    except (OSError, ValueError):  # too long, or with a NUL: a pattern may be
        return False


def as_manifest(given: ManifestLike) -> Manifest:
    from .integrations import arguments

    return arguments.as_manifest(as_path(given) if isinstance(given, str | os.PathLike | URL) else given)


def as_builder(given: str) -> Callable[[], Any]:
    """The function that ``module:function`` names; from now on modules are found from the working directory too.

    Raises:
        UsageError: if it is not of that form, cannot be imported, or is no function.
    """
    module, separator, function = given.partition(":")
    if not (module and separator and function) or not all(part.isidentifier() for part in module.split(".")):
        raise UsageError(f'"{shown(given)}" names no function; write module:function, as Python imports it')
    sys.path.insert(0, str(Path.cwd()))
    try:
        found: Any = importlib.import_module(module)
        for part in function.split("."):
            found = getattr(found, part)
    except (Exception, SystemExit) as error:  # whatever a user's module raises when it is imported
        raise UsageError(f"{shown(given)} cannot be imported: {type(error).__name__}: {shown(error)}") from error
    if not callable(found):
        raise UsageError(f"{shown(given)} is no function, but {type(found).__name__}")
    return cast("Callable[[], Any]", found)


@contextmanager
def opened_with(model: str | None, *paths: Path | URL) -> Iterator[Sequence[TensorsLike]]:
    """Checkpoints, of which those of Keras are read into the model that ``module:function`` makes.

    Raises:
        UsageError: if the model cannot be made, or none of the paths is a file of Keras.
    """
    if model is None:
        yield paths
        return
    if not any(map(is_keras_file, paths)):
        raise UsageError(NO_MODEL.format(enumerate_names([str(path) for path in paths])))
    from .frameworks.importing import import_keras

    import_keras()  # before the user's module does it, and less quietly
    with ExitStack() as stack:
        # What the user's code prints is no part of a document.
        with redirect_stdout(sys.stderr):
            build = as_builder(model)
            opened = [
                stack.enter_context(open_checkpoint(path, model=build)) if is_keras_file(path) else path
                for path in paths
            ]
        yield opened


@contextmanager
def checkpoint_of(given: TensorsLike) -> Iterator[Checkpoint]:
    """A checkpoint, or what is in memory as one; closed at the end if it was opened here."""
    if isinstance(given, str | os.PathLike | URL):
        with open_checkpoint(as_place(given)) as opened:
            yield opened
        return
    with tensors_of(given) as source:
        yield source if isinstance(source, Checkpoint) else Checkpoint.over(source)


def is_keras(given: object) -> bool:
    """Whether it is a live model of Keras, which on torch is a module too."""
    keras = sys.modules.get("keras")  # whoever has a model has imported it
    return keras is not None and isinstance(given, keras.Layer)


def is_model(given: object) -> bool:
    """Whether it is a live model."""
    torch = sys.modules.get("torch")  # likewise
    return is_keras(given) or (torch is not None and isinstance(given, torch.nn.Module))


@contextmanager
def donors_of(given: Mapping[str, TensorsLike] | None) -> Iterator[Mapping[str, Checkpoint]]:
    """Checkpoints by what a spec calls them; closed at the end if they were opened here."""
    with ExitStack() as stack:
        yield {name: stack.enter_context(checkpoint_of(donor)) for name, donor in (given or {}).items()}


def as_donors(given: Sequence[str]) -> dict[str, Path | URL]:
    """Places by name, of texts of the form ``NAME=CKPT``.

    Raises:
        UsageError: if one has another form, or two have one name.
    """
    donors: dict[str, Path | URL] = {}
    for text in given:
        name, separator, path = text.partition("=")
        if not (name and separator and path):
            raise UsageError(f'"{shown(text)}" is no donor; write NAME=CKPT')
        if name in donors:
            raise UsageError(f'two donors are called "{shown(name)}"')
        donors[name] = as_place(path)
    return donors


@contextmanager
def tensors_of(given: TensorsLike, wanted: Collection[str] = ()) -> Iterator[TensorSource]:
    """The tensors of a checkpoint, live model or state dict; of a model under these names, where it knows them."""
    torch: Any = sys.modules.get("torch")
    if is_keras(given):
        from .frameworks.keras import KerasVariables

        yield KerasVariables(given, wanted)
    elif is_model(given):
        from .integrations.pytorch import source_of

        yield source_of(cast(Any, given), wanted)
    elif torch is not None and isinstance(given, Mapping):
        yield _of_state_dict(given)
    elif isinstance(given, str | os.PathLike | URL):
        with open_trained(as_place(given)) as opened:
            yield opened
    elif hasattr(given, "tensors") and hasattr(given, "read"):
        yield cast("TensorSource", given)
    else:
        raise UsageError(f"expected a path, checkpoint, model or state dict, found {shown(type(given).__name__)}")


def _of_state_dict(given: Mapping[str, Any]) -> TensorSource:
    """The tensors of a state dict, which holds nothing else, and each by name."""
    import torch

    from .formats.saved_by_torch import STATE_DICT_KEYS
    from .frameworks.pytorch import TorchTensors

    # What get_extra_state() of a module gave is no weight, whatever it is.
    tensors: dict[Any, Any] = {name: one for name, one in given.items() if not str(name).endswith("_extra_state")}
    for name, value in tensors.items():
        if not isinstance(value, torch.Tensor):
            inside = next((key for key in STATE_DICT_KEYS if isinstance(tensors.get(key), Mapping)), None)
            raise UsageError(
                f'"{shown(name)}" of the state dict is a {type(value).__name__}, not a tensor',
                hint=f'give what is inside: checkpoint["{inside}"]' if inside else None,
            )
    for name in tensors:
        if not isinstance(name, str):
            kind = type(name).__name__
            raise UsageError(f"{shown(name)} of the state dict is a {kind}; the name of a tensor is text")
    return TorchTensors(tensors, "the state dict")


_UNITS = {"": 1, "B": 1, **{f"{prefix}B": 1000**power for power, prefix in enumerate("KMGT", 1)}}
_UNITS |= {f"{prefix}IB": 1024**power for power, prefix in enumerate("KMGT", 1)}


def as_size(given: int | str | None) -> int | None:
    """Bytes in ``5GB`` (10^9) or ``5GiB`` (2^30)."""
    from decimal import Decimal

    if given is None:
        return None
    match = re.fullmatch(r"([0-9]{1,30}(?:\.[0-9]+)?)\s*([A-Za-z]*)", str(given).strip())
    if match is None or match[2].upper() not in _UNITS:
        raise UsageError(f'"{shown(given)}" is no size; write 5GB, 500MB or a number of bytes')
    size = int(Decimal(match[1]) * _UNITS[match[2].upper()])
    if size < 1:
        raise UsageError("the largest size of a shard must be at least one byte")
    return size


def as_algorithm(given: str) -> str:
    if given not in ALGORITHMS:
        raise UsageError(f'unknown digest "{shown(given)}"; one of: {", ".join(ALGORITHMS)}')
    return given


def as_ranks(given: GroupLike) -> Ranks:
    """The ranks of a process group; of None this process alone.

    Raises:
        UsageError: if it is no process group.
    """
    if given is None:
        return ALONE
    if isinstance(given, Ranks):
        return given
    if (module := sys.modules.get("torch.distributed")) is None or not isinstance(given, module.ProcessGroup):
        raise UsageError(f"expected a process group of torch.distributed, found {shown(given, 60)}")
    from .ranks.process_group import ProcessGroupRanks

    return ALONE if given.size() == 1 else ProcessGroupRanks.of(given)


def as_jobs(given: int | None, ranks: Ranks = ALONE) -> int:
    """A number of threads; None for one on each processor, dealt out to the ranks that share them.

    Raises:
        UsageError: if it is no number from 1 to ``MOST_JOBS``.
    """
    if given is None:
        return max(1, available_jobs() // ranks.on_this_host)
    if type(given) is not int or not 1 <= given <= MOST_JOBS:
        raise UsageError(f"jobs must be a whole number from 1 to {MOST_JOBS}, found {shown(given, 40)}")
    return given


def as_patterns(given: object) -> list[str]:
    """One pattern, or several.

    Raises:
        UsageError: if there is none, or one is no text.
    """
    patterns = [given] if isinstance(given, str) else list(given) if isinstance(given, Sequence) else []
    if not patterns or not all(isinstance(pattern, str) for pattern in patterns):
        raise UsageError(f"expected a pattern, or a list of them, found {shown(given, 60)}")
    return patterns
