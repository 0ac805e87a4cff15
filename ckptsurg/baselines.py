"""The published tensors, beside what came back from training: which are the same, and where the others differ."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, NoReturn

from .counterparts import Counterparts
from .dealing import deal_out
from .errors import UsageError
from .manifest import Manifest, TensorRecord
from .metering import Meter
from .ranks import ALONE, Ranks
from .reading import unequal
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
        self._frozen = frozen
        self._published = Counterparts(manifest, source, {name: name for name in source.tensors})
        for name, record in frozen.items():
            if self._published.tensors.get(name) != record.info:
                self._refuse(name, "is missing, or has another dtype or shape")

    def _refuse(self, name: str, reason: str) -> NoReturn:
        raise UsageError(
            f'{self._published.label}: is not the baseline of this manifest: "{shown(name)}" {reason}',
            hint="the baseline is the output that the manifest was published with",
        )

    def equal(self, trained: Counterparts, meter: Meter, jobs: int, ranks: Ranks = ALONE) -> Collection[str]:
        """Which tensors lie in files with the bytes that they have here. A file says nothing of itself.

        Args:
            trained: What is compared.
            meter: Told how many bytes were compared.
            jobs: How many threads read.
            ranks: Among which the tensors are dealt out.
        """
        there, here = trained.held_extents(self._frozen), self._published.held_extents(self._frozen)
        pairs = {
            name: (extent, here[name])
            for name, extent in there.items()
            if name in here and not os.path.samestat(here[name].file.status, extent.file.status)
        }
        in_order = sorted(pairs, key=lambda name: (pairs[name][0].file.name, pairs[name][0].offset))
        own = deal_out({name: pairs[name][0].length for name in in_order}, ranks.size)[ranks.rank]
        labels = (trained.label, self._published.label)
        found = ranks.gather(lambda: set(own) - unequal({name: pairs[name] for name in own}, labels, meter, jobs))
        return ranks.broadcast(lambda: set[str]().union(*found))

    def note(self, count: int) -> str | None:
        """What a report says of so many tensors that are equal."""
        what = f"{counted(count)} compared with {self._published.label} byte by byte, so no digest was computed"
        return what if count else None

    def locate(
        self, drifted: Iterable[Difference], trained: Counterparts
    ) -> tuple[list[Difference], dict[str, Traits]]:
        """Changes with their places and sizes; and in which way tensors changed, by name."""
        located = []
        traits = {}
        for difference in drifted:
            if difference.verdict in ("changed", "dtype"):
                difference, how = self._look_into(difference, trained)
                if how is not None:
                    traits[difference.name] = how
            located.append(difference)
        return located, traits

    def _look_into(self, difference: Difference, trained: Counterparts) -> tuple[Difference, Traits | None]:
        from .comparing import compare, was_cast
        from .traits import Traits

        name, record = difference.name, self._frozen[difference.name]
        if digest_of(self._published.read(name), algorithm_of(record.digest)) != record.digest:
            self._refuse(name, "has other bits")

        def before() -> Iterator[Buffer]:
            return self._published.held_bytes(name, record)

        def after() -> Iterator[Buffer]:
            return trained.held_bytes(name, record)

        if difference.verdict == "dtype":
            dtype = trained.tensors[name].dtype
            return difference, Traits.of_cast(dtype) if was_cast(before, after, record.dtype, dtype) else None
        found = compare(before, after, record.held)
        if found is None:
            return difference, None
        verdict, detail, traits = found
        if record.rows is not None:
            first, *rest = detail.first_index
            detail = detail.model_copy(update={"first_index": (first + record.rows.start, *rest)})
        return Difference(name=name, verdict=verdict, detail=detail), traits
