"""What the two sides say of frozen tensors that moved: the evidence that settles causes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from .comparing import same_bits
from .counterparts import Counterparts
from .manifest import Manifest, TensorRecord
from .renaming import unwrapped
from .report import Difference
from .settling import Evidence
from .tensors import DTYPE_BITS, FLOATS, algorithm_of, digest_of
from .traits import Traits

__all__ = ["gather"]


def gather(
    manifest: Manifest,
    frozen: Mapping[str, TensorRecord],
    trained: Counterparts,
    drifted: Sequence[Difference],
    traits: Mapping[str, Traits],
    *,
    given: Iterable[str],
    saved: bool,
    witnessed: Mapping[str, str] | None,
) -> Evidence:
    """The evidence on every difference.

    Args:
        manifest: What should hold.
        frozen: Those of its tensors that were looked at.
        trained: What is there.
        drifted: Those that are not what they should be.
        traits: How each of them changed, where a baseline shows it.
        given: What the other side calls its tensors.
        saved: Whether the other side was saved.
        witnessed: Causes that were seen while the model trained, by name; None where nobody watched.
    """
    moved = {difference.name for difference in drifted}
    held = {name: record for name, record in frozen.items() if name not in moved}
    return Evidence(
        names=manifest.tensors.keys(),
        given={unwrapped(name) for name in given},
        ranks={name: len(record.shape) for name, record in frozen.items() if record.dtype in FLOATS},
        saved=saved,
        witnessed=witnessed,
        traits=traits,
        twins=_moving_twins(manifest, drifted, trained),
        recognised=bool(trained.tensors),
        uniform=_uniform_vectors(held, trained) if traits else (),
        standing=_standing_counters(held),
    )


def _moving_twins(manifest: Manifest, drifted: Iterable[Difference], trained: Counterparts) -> set[str]:
    """Frozen tensors that moved and are equal to a trainable one, as they were before: the two are one in the model."""
    changed = {one.name: manifest.tensors[one.name] for one in drifted if one.verdict == "changed"}
    changed = {name: record for name, record in changed.items() if len(record.shape) >= 2 and record.rows is None}
    by_digest = {record.digest: name for name, record in changed.items()}
    found = set()
    for other, record in manifest.tensors.items():
        name = by_digest.get(record.digest)
        if name is None or record.frozen or trained.tensors.get(other) != record.info:
            continue
        if same_bits(trained.read(name), trained.read(other)):
            found.add(name)
    return found


def _uniform_vectors(held: Mapping[str, TensorRecord], trained: Counterparts) -> set[str]:
    """Vectors with fractions all of whose elements have the same bits."""
    found = set()
    for name, record in held.items():
        if len(record.shape) == 1 and record.dtype in FLOATS:
            raw = b"".join(bytes(chunk) for chunk in trained.read(name))
            element = DTYPE_BITS[record.dtype] // 8
            if raw == raw[:element] * (len(raw) // element):
                found.add(name)
    return found


def _standing_counters(held: Mapping[str, TensorRecord]) -> set[str]:
    """Counters of batches that are not zero, and are what they were. Those of InstanceNorm are always zero."""
    return {
        name
        for name, record in held.items()
        if name.endswith("num_batches_tracked")
        and record.digest != digest_of([bytes(record.info.nbytes)], algorithm_of(record.digest))
    }
