"""What stands for a manifest's tensors in a checkpoint or live model: under the manifest's names, against its records.

What compares dtypes needs numpy, and is imported once two differ.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from .checkpoints import Extent, extents_of
from .manifest import Manifest, TensorRecord
from .metering import Meter
from .reading import digests
from .renaming import align
from .report import Difference, Verdict
from .tensors import Buffer, TensorInfo, TensorSource, algorithm_of, digest_of

__all__ = ["Counterparts"]


class Counterparts:
    """The tensors of a source that stand for a manifest's, by the manifest's names.

    Args:
        manifest: The manifest.
        source: Where they are.
        called: From names of the source to what they are called (``renamed``).

    Attributes:
        label: How messages call the source.
        tensors: Dtype and shape of each; what the source lacks is left out.

    Raises:
        UsageError: if two tensors could stand for one.
    """

    def __init__(self, manifest: Manifest, source: TensorSource, called: Mapping[str, str]) -> None:
        self._source, self._partners = source, align(manifest.tensors, called)
        self.label, given = source.label, source.tensors
        self.tensors: Mapping[str, TensorInfo] = {name: given[partner] for name, partner in self._partners.items()}

    def others(self) -> tuple[str, ...]:
        """What the source has besides, by its own names."""
        taken = set(self._partners.values())
        return tuple(name for name in self._source.tensors if name not in taken)

    def read(self, name: str) -> Iterator[Buffer]:
        """All bytes of a tensor, in chunks."""
        return self._source.read(self._partners[name])

    def held_bytes(self, name: str, record: TensorRecord) -> Iterator[Buffer]:
        """Those of the part that its record freezes."""
        return iter(record.held_bytes(self.read(name), self.tensors[name]))

    def held_extents(self, records: Mapping[str, TensorRecord]) -> dict[str, Extent]:
        """Where in files the frozen parts lie, of tensors that are there as their records say, bits aside."""
        extents = extents_of(self._source)
        found = {}
        for name, record in records.items():
            partner = self._partners.get(name)
            if partner is None or (extent := extents.get(partner)) is None:
                continue
            info = self.tensors[name]
            if info.dtype == record.dtype and _has_room(info, record):
                found[name] = extent.part(*record.held_span(info))
        return found

    def differences(self, records: Mapping[str, TensorRecord], meter: Meter, jobs: int) -> list[Difference]:
        """The tensors that have not the dtype, shape and bits that their records freeze, in the order of the records.

        Args:
            records: What should hold.
            meter: Told how many bytes are read.
            jobs: How many threads hash what lies in files as it is; all else is hashed as it is read.
        """
        extents = self.held_extents(records)
        wanted = {name: (extent, algorithm_of(records[name].digest)) for name, extent in extents.items()}
        known = digests(wanted, self.label, meter, jobs)
        found = (self._difference(name, record, known.get(name), meter) for name, record in records.items())
        return [difference for difference in found if difference is not None]

    def _difference(self, name: str, record: TensorRecord, digest: str | None, meter: Meter) -> Difference | None:
        """Of one tensor; ``digest`` is that of its frozen part, if it is known by now."""
        info = self.tensors.get(name)
        if info is None:
            return Difference(name=name, verdict="missing")
        verdict: Verdict = "shape"
        if _has_room(info, record):
            if digest is None:
                held = record.held_bytes(meter.over(self.read(name)), info)
                digest = _digest_in(record.dtype, held, info.dtype, algorithm_of(record.digest))
            is_same = digest == record.held_digest
            if info.dtype == record.dtype:
                return None if is_same else Difference(name=name, verdict="changed")
            verdict = "dtype_only" if is_same else "dtype"
        return Difference(name=name, verdict=verdict, detail={"expected": str(record.info), "found": str(info)})


def _digest_in(dtype: str, chunks: Iterable[Buffer], own: str, algorithm: str) -> str | None:
    """The digest of a tensor of that dtype, or of one that is wider without need; None if it is neither."""
    if own == dtype:
        return digest_of(chunks, algorithm)
    from .comparing import is_wider, narrowed_digest

    return narrowed_digest(chunks, own, dtype, algorithm) if is_wider(own, dtype) else None


def _has_room(info: TensorInfo, record: TensorRecord) -> bool:
    """Whether a tensor has the shape of its record; where rows are frozen, others may have been added or taken away."""
    if record.rows is None or not info.shape:
        return info.shape == record.shape
    return info.shape[1:] == record.shape[1:] and info.shape[0] >= record.rows.stop
