"""The published tensors, beside what came back from training: which are the same, and where the others differ."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, NoReturn

from .checkpoints import Extent, extents_of
from .errors import UsageError
from .manifest import Manifest, TensorRecord
from .metering import Meter
from .reading import unequal
from .renaming import align
from .report import Difference
from .tensors import Buffer, TensorSource, algorithm_of, digest_of
from .wording import counted, shown

if TYPE_CHECKING:
    from .traits import Traits

__all__ = ["Baseline"]


class Baseline:
    """The tensors that a manifest describes: what is compared with them need not be hashed, and changes are located.

    Args:
        manifest: The manifest.
        frozen: Those of its tensors that are looked at.
        source: The tensors.

    Raises:
        UsageError: if they are not those tensors.
    """

    def __init__(self, manifest: Manifest, frozen: Mapping[str, TensorRecord], source: TensorSource) -> None:
        self._manifest, self._source = manifest, source
        self._partners = align(manifest.tensors, {name: name for name in source.tensors})
        for name, record in frozen.items():
            if name not in self._partners or source.tensors[self._partners[name]] != record.info:
                self._refuse(name, "is missing, or has another dtype or shape")

    def _refuse(self, name: str, reason: str) -> NoReturn:
        raise UsageError(
            f'{self._source.label}: is not the baseline of this manifest: "{shown(name)}" {reason}',
            hint="the baseline is the output that the manifest was published with",
        )

    def equal(self, lying: Mapping[str, Extent], trained: TensorSource, meter: Meter, jobs: int) -> Iterable[str]:
        """Which tensors have the bytes that they have here. A file that is the other one says nothing of itself.

        Args:
            lying: Where the frozen parts of trained tensors are, by the manifest's names.
            trained: Whose they are.
            meter: Told how many bytes were compared.
            jobs: How many threads read.
        """
        extents = extents_of(self._source)
        pairs = {}
        for name, extent in lying.items():
            own = extents.get(self._partners[name])
            if own is not None and not os.path.samestat(own.file.status, extent.file.status):
                record = self._manifest.tensors[name]
                pairs[name] = extent, own.part(*record.held_span(record.info))
        differing = unequal(pairs, (trained.label, self._source.label), meter, jobs)
        return [name for name in pairs if name not in differing]

    def note(self, count: int) -> str | None:
        """What a report says of so many tensors that are equal."""
        what = f"{counted(count)} compared with {self._source.label} byte by byte, so no digest was computed"
        return what if count else None

    def locate(
        self, difference: Difference, record: TensorRecord, trained: TensorSource, partner: str
    ) -> tuple[Difference, Traits | None]:
        """A change with its place, its size and its traits."""
        from .comparing import compare, was_cast
        from .traits import Traits

        if difference.verdict not in ("changed", "dtype"):
            return difference, None
        own, info = self._partners[difference.name], trained.tensors[partner]
        if digest_of(self._source.read(own), algorithm_of(record.digest)) != record.digest:
            self._refuse(difference.name, "has other bits")

        def before() -> Iterator[Buffer]:
            return iter(record.held_bytes(self._source.read(own), record.info))

        def after() -> Iterator[Buffer]:
            return iter(record.held_bytes(trained.read(partner), info))

        if difference.verdict == "dtype":
            cast = was_cast(before, after, record.dtype, info.dtype)
            return difference, Traits.of_cast(info.dtype) if cast else None
        found = compare(before, after, record.held)
        if found is None:
            return difference, None
        verdict, detail, traits = found
        if record.rows is not None:
            first, *rest = detail.first_index
            detail = detail.model_copy(update={"first_index": (first + record.rows.start, *rest)})
        return Difference(name=difference.name, verdict=verdict, detail=detail), traits
