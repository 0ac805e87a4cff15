"""Two checkpoints or models -> report: where they differ, tensor by tensor.

What looks into differences needs numpy, and is imported once there is one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from .checkpoints import extents_of
from .errors import CheckpointError
from .metering import Meter, Progress
from .reading import unequal
from .renaming import unwrapped
from .report import Difference, DiffReport
from .tensors import FLOATS, Buffer, TensorSource, digest_of, refuse_unstorable
from .wording import shown

if TYPE_CHECKING:
    from .traits import Traits

__all__ = ["diff"]


def diff(a: TensorSource, b: TensorSource, *, jobs: int = 1, progress: Progress | None = None) -> DiffReport:
    """Compare two checkpoints or models, tensor by tensor, bit by bit.

    Args:
        a: The one.
        b: The other.
        jobs: How many threads read what lies in files as it is.
        progress: Told how many bytes are read.

    Raises:
        UsageError: if a dtype is one that safetensors does not have.
        CheckpointError: if one of them changes meanwhile.
        SystemFailure: if one of them cannot be read.
    """
    for source in (a, b):
        refuse_unstorable(source.label, source.tensors)
    alike = [name for name, info in a.tensors.items() if b.tensors.get(name) == info]
    meter = Meter(sum(a.tensors[name].nbytes for name in alike), progress)
    here, there = extents_of(a), extents_of(b)
    pairs = {name: (here[name], there[name]) for name in alike if name in here and name in there}
    differing = unequal(pairs, (a.label, b.label), meter, jobs)
    differences: list[Difference] = []
    traits: dict[str, Traits] = {}
    for name, info in a.tensors.items():
        other = b.tensors.get(name)
        if other is None:
            differences.append(Difference(name=name, verdict="removed"))
        elif other != info:
            differences.append(_differing_info(name, a, b))
        elif name in differing or (name not in pairs and _differs(name, a, b, meter)):
            from .comparing import compare

            found = compare(_reader(a, name), _reader(b, name), info)
            if found is None:
                raise CheckpointError(f'{a.label}, {b.label}: "{shown(name)}" changed while it was compared')
            differences.append(Difference(name=name, verdict=found[0], detail=found[1]))
            traits[name] = found[2]
    if differences:
        from .settling import Evidence, with_causes

        changed = {difference.name for difference in differences}
        evidence = Evidence(
            names=a.tensors.keys(),
            given={unwrapped(name) for name in b.tensors},
            ranks={name: len(info.shape) for name, info in a.tensors.items() if info.dtype in FLOATS},
            traits=traits,
            standing={name for name in a.tensors if name not in changed and _has_counted(a, name)},
        )
        differences = with_causes(differences, evidence)
    differences += [Difference(name=name, verdict="added") for name in b.tensors if name not in a.tensors]
    return DiffReport(ok=not differences, tensors=tuple(differences))


def _differs(name: str, a: TensorSource, b: TensorSource, meter: Meter) -> bool:
    from .comparing import same_bits

    return not same_bits(meter.over(a.read(name)), b.read(name))


def _has_counted(source: TensorSource, name: str) -> bool:
    return name.endswith("num_batches_tracked") and any(any(bytes(chunk)) for chunk in source.read(name))


def _reader(source: TensorSource, name: str) -> Callable[[], Iterator[Buffer]]:
    return lambda: source.read(name)


def _differing_info(name: str, a: TensorSource, b: TensorSource) -> Difference:
    from .comparing import is_wider, narrowed_digest

    one, other = a.tensors[name], b.tensors[name]
    detail = {"first": str(one), "second": str(other)}
    if one.shape != other.shape:
        return Difference(name=name, verdict="shape", detail=detail)
    narrow, wide = (a, b) if is_wider(other.dtype, one.dtype) else (b, a)
    n, w = narrow.tensors[name].dtype, wide.tensors[name].dtype
    if is_wider(w, n) and narrowed_digest(wide.read(name), w, n, "blake3") == digest_of(narrow.read(name)):
        return Difference(name=name, verdict="dtype_only", detail=detail)
    return Difference(name=name, verdict="dtype", detail=detail)
