"""What stands for a manifest's tensors in a checkpoint or live model: under the manifest's names, against its records.

What compares dtypes needs numpy, and is imported once two differ.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from .checkpoints import Checkpoint, Extent, extents_of
from .dealing import deal_out
from .errors import UsageError
from .manifest import Manifest, TensorRecord
from .metering import Meter
from .ranks import ALONE, Ranks
from .reading import digests
from .renaming import align
from .report import Difference, Verdict
from .tensors import Buffer, TensorInfo, TensorSource, algorithm_of, digest_of

__all__ = ["Counterparts", "mismatched"]


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
            if info.dtype == record.dtype and _holds(info, record):
                found[name] = extent.part(*record.held_span(info))
        return found

    def digests(
        self, records: Mapping[str, TensorRecord], meter: Meter, jobs: int, ranks: Ranks = ALONE
    ) -> Mapping[str, str | None]:
        """The digests of what records freeze, of tensors that hold it; known to the first rank alone.

        That of a tensor in a wider dtype is of its values in the record's; of one in any other there is None.

        Args:
            records: What should hold.
            meter: Told how many bytes are read.
            jobs: How many threads hash what lies in files as it is; all else is hashed as it is read.
            ranks: Among which the tensors are dealt out.

        Raises:
            UsageError: if they were not all read: ranks had others in mind.
        """
        extents = self.held_extents(records)
        sizes = {
            name: self.tensors[name].nbytes
            for name in sorted(self.tensors.keys() & records.keys(), key=lambda name: self._place(name, extents))
            if _holds(self.tensors[name], records[name])
        }
        own = deal_out(sizes, ranks.size)[ranks.rank]

        def made() -> dict[str, str | None]:
            wanted = {name: (extents[name], algorithm_of(records[name].digest)) for name in own if name in extents}
            known: dict[str, str | None] = {**digests(wanted, self.label, meter, jobs)}
            for name in own:
                if name not in known:
                    record, info = records[name], self.tensors[name]
                    held = record.held_bytes(meter.over(self.read(name)), info)
                    known[name] = _digest_in(record.dtype, held, info.dtype, algorithm_of(record.digest))
            return known

        found = {name: digest for known in ranks.gather(made) for name, digest in known.items()}

        def refuse_unread() -> None:
            if found.keys() != sizes.keys():
                raise UsageError("the ranks have other names for tensors", hint="give all of them the same names")

        ranks.broadcast(refuse_unread)
        return found

    def _place(self, name: str, extents: Mapping[str, Extent]) -> tuple[str, int, str]:
        """In which order tensors are read: neighbours one after the other."""
        if (extent := extents.get(name)) is not None:
            return extent.file.name, extent.offset, name
        return self._source.file_of(self._partners[name]) if isinstance(self._source, Checkpoint) else "", 0, name

    def differences(self, records: Mapping[str, TensorRecord], known: Mapping[str, str | None]) -> list[Difference]:
        """The tensors that have not the dtype, shape and bits that their records freeze, in the order of the records.

        Args:
            records: What should hold.
            known: What ``digests`` has found.
        """
        found = (self._difference(name, record, known.get(name)) for name, record in records.items())
        return [difference for difference in found if difference is not None]

    def _difference(self, name: str, record: TensorRecord, digest: str | None) -> Difference | None:
        info = self.tensors.get(name)
        if info is None:
            return Difference(name=name, verdict="missing")
        verdict: Verdict = "shape"
        if _holds(info, record):
            is_same = digest == record.held_digest
            if info.dtype == record.dtype:
                return None if is_same else Difference(name=name, verdict="changed")
            verdict = "dtype_only" if is_same else "dtype"
        return _other_info(name, record, info, verdict)


def mismatched(records: Mapping[str, TensorRecord], tensors: Mapping[str, TensorInfo]) -> list[Difference]:
    """What trains, and is there in another shape, or in a dtype that does not hold every value of its own.

    A wider one does, and the digest then tells whether the values moved; of a narrower copy nothing tells it.

    Args:
        records: What a manifest says of tensors.
        tensors: Dtype and shape of those that stand for them.
    """
    found = []
    for name, record in records.items():
        info = tensors.get(name)
        if not record.trains or info is None or info == record.info:
            continue
        if info.shape != record.shape:
            found.append(_other_info(name, record, info, "shape"))
            continue
        from .comparing import is_wider

        if not is_wider(info.dtype, record.dtype):
            found.append(_other_info(name, record, info, "dtype"))
    return found


def _other_info(name: str, record: TensorRecord, info: TensorInfo, verdict: Verdict) -> Difference:
    return Difference(name=name, verdict=verdict, detail={"expected": str(record.info), "found": str(info)})


def _digest_in(dtype: str, chunks: Iterable[Buffer], own: str, algorithm: str) -> str | None:
    """The digest of a tensor of that dtype, or of one that is wider without need; None if it is neither."""
    if own == dtype:
        return digest_of(chunks, algorithm)
    from .comparing import is_wider, narrowed_digest

    return narrowed_digest(chunks, own, dtype, algorithm) if is_wider(own, dtype) else None


def _holds(info: TensorInfo, record: TensorRecord) -> bool:
    """Whether a tensor has the shape of its record; where rows are frozen, others may have been added or taken away."""
    if record.rows is None or not info.shape:
        return info.shape == record.shape
    return info.shape[1:] == record.shape[1:] and info.shape[0] >= record.rows.stop
