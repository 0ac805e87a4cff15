"""The manifest: the document that says, for every tensor of an output, its digest and whether it is frozen."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Literal, NotRequired, Self, TypeAlias

from pydantic import ConfigDict, FailFast, Field, PrivateAttr, StringConstraints, with_config
from typing_extensions import TypedDict

from .documents import Document, Model, canonical_json, is_empty, is_false, is_none, may_lack
from .errors import ManifestError, Problem, UsageError, system_failures
from .parsing import Text, known_document, parse_json, read_bytes
from .tensors import DTYPE_BITS, Buffer, TensorInfo, algorithm_of, digest_of, row_span, section, unstorable
from .wording import enumerate_names, shown

__all__ = [
    "MANIFEST_NAME",
    "BaseFile",
    "FrozenRows",
    "Manifest",
    "Origin",
    "SpecIdentity",
    "TensorRecord",
    "is_file_output",
    "load_manifest",
    "manifest_path",
]

#: Of an output folder.
MANIFEST_NAME = "freeze.json"
MAX_MANIFEST_BYTES = 1 << 30
#: How many tensors of a document are looked at together.
_AT_ONCE = 10_000

DigestText: TypeAlias = Annotated[str, StringConstraints(pattern=r"^(blake3|sha256):[0-9a-f]{64}$")]
Origin: TypeAlias = Literal["copied", "reinitialised", "added", "cast", "grafted"]


class FrozenRows(Model):
    """The part of a tensor that is frozen, along its first dimension.

    Attributes:
        start: The first row.
        stop: The row after the last.
        digest: Digest of the raw bytes of these rows.
    """

    start: Annotated[int, Field(ge=0)]
    stop: Annotated[int, Field(ge=1)]
    digest: DigestText


class TensorRecord(Model):
    """One tensor of the output.

    Attributes:
        dtype: Its dtype, as the file spells it.
        shape: Size of each dimension.
        frozen: Whether training must not change it, or not the rows that are named.
        origin: Where its bytes come from.
        digest: Digest of its raw little-endian bytes.
        rows: The rows that are frozen, where the rest of the tensor trains.
        inherited: Whether the digests were taken from the base's manifest, not computed.
        base_name: What the base calls it, where that is another name; ``from`` in the document.
    """

    dtype: str
    shape: tuple[Annotated[int, Field(ge=0)], ...]
    frozen: bool
    origin: Origin
    digest: DigestText
    rows: FrozenRows | None = Field(default=None, exclude_if=is_none)
    inherited: bool = Field(default=False, exclude_if=is_false)
    base_name: str | None = Field(default=None, alias="from", exclude_if=is_none)

    model_config = ConfigDict(validate_by_name=True, validate_by_alias=True)

    @property
    def info(self) -> TensorInfo:
        return TensorInfo(self.dtype, self.shape)

    @property
    def trains(self) -> bool:
        """Whether training may change it, if only in a part."""
        return not self.frozen or (self.rows is not None and self.rows.stop - self.rows.start < self.shape[0])

    @property
    def is_whole(self) -> bool:
        """Whether all of it is frozen, however many rows it may get."""
        return self.frozen and self.rows is None

    @property
    def held(self) -> TensorInfo:
        """Dtype and shape of the frozen part."""
        if self.rows is None:
            return self.info
        return TensorInfo(self.dtype, (self.rows.stop - self.rows.start, *self.shape[1:]))

    @property
    def held_digest(self) -> str:
        """Digest of the frozen part."""
        return self.digest if self.rows is None else self.rows.digest

    def held_bytes(self, chunks: Iterable[Buffer], info: TensorInfo) -> Iterable[Buffer]:
        """The frozen part of a tensor that stands for this one.

        Args:
            chunks: All its bytes.
            info: Its dtype and shape, which may be wider and have more rows.
        """
        return chunks if self.rows is None else section(chunks, self.held_span(info))

    def held_span(self, info: TensorInfo) -> tuple[int, int]:
        """First byte of the frozen part and the one after its last, of a tensor that stands for this one."""
        return (0, info.nbytes) if self.rows is None else row_span(info, (self.rows.start, self.rows.stop))


class Tool(Model):
    name: str = "ckptsurg"
    version: str = Field(default_factory=lambda: version("ckptsurg"))


class SpecIdentity(Model):
    """Which spec the output was made to: its name, and the digest of its canonical JSON."""

    name: str | None
    digest: DigestText


class BaseFile(Model):
    """A file of the base: its name, its size in bytes, and the digest of its header's JSON."""

    file: str
    size: Annotated[int, Field(ge=0)]
    header_digest: DigestText


@with_config(ConfigDict(extra="forbid", strict=True, json_schema_extra=may_lack("cast", "grafted")))
class Counts(TypedDict):
    """How many tensors the output has of each kind, and how many of the base it has not."""

    frozen: int
    trainable: int
    reinitialised: int
    added: int
    dropped: int
    cast: NotRequired[int]
    grafted: NotRequired[int]


class Manifest(Document):
    """What an output is, and what of it must hold after training.

    Attributes:
        tool: What made it.
        spec: To which spec.
        base: From which files.
        donors: From which files of other checkpoints tensors were grafted, by what the spec calls these.
        root: Digest over all tensors: pins the output as published.
        frozen_root: Digest over the frozen tensors: pins what must hold after training.
        counts: How many tensors are frozen, trainable, reinitialised, added and dropped.
        tensors: Every tensor of the output by name.
        tied: Groups of frozen tensors of two or more dimensions with equal digests, frozen in the same rows.
        dropped: Names of the base that the output does not have.
    """

    error = ManifestError

    version: Literal[1] = Field(description="Version of this document's form.")
    tool: Tool
    spec: SpecIdentity
    base: Annotated[tuple[BaseFile, ...], FailFast()]
    donors: dict[str, tuple[BaseFile, ...]] = Field(default_factory=dict, exclude_if=is_empty)
    root: DigestText
    frozen_root: DigestText
    counts: Counts
    tensors: dict[str, TensorRecord]
    tied: Annotated[tuple[tuple[str, ...], ...], FailFast()] = ()
    dropped: Annotated[tuple[str, ...], FailFast()] = ()

    _label: str = PrivateAttr(default="the manifest")

    @classmethod
    def from_text(cls, text: Text) -> Self:
        # Some at a time: what is wrong with each takes a hundred times the memory of the tensor itself.
        rest = list(text.data["tensors"].items()) if _has_many_tensors(text.data) else []
        manifest = super().from_text(text if not rest else replace(text, data=text.data | {"tensors": {}}))
        records = dict(manifest.tensors)
        for start in range(0, len(rest), _AT_ONCE):
            part = {"base": [], "tied": [], "dropped": [], "tensors": dict(rest[start : start + _AT_ONCE])}
            records |= super().from_text(replace(text, data=text.data | part)).tensors
        manifest = manifest.model_copy(update={"tensors": records})
        manifest._label = text.label
        return manifest

    @classmethod
    def of(
        cls,
        tensors: Mapping[str, TensorRecord],
        *,
        spec: SpecIdentity,
        base: Iterable[BaseFile],
        dropped: Iterable[str],
        algorithm: str,
        donors: Mapping[str, Iterable[BaseFile]] | None = None,
    ) -> Self:
        """The manifest of an output; everything that follows from the tensors is computed."""
        ordered = {name: tensors[name] for name in sorted(tensors, key=str.encode)}
        gone = tuple(sorted(dropped, key=str.encode))
        return cls(
            version=1,
            tool=Tool(),
            spec=spec,
            base=tuple(base),
            donors={name: tuple(files) for name, files in (donors or {}).items()},
            root=root_of(ordered, algorithm),
            frozen_root=frozen_root_of(ordered, algorithm),
            counts=_counts(ordered, gone),
            tensors=ordered,
            tied=_tied(ordered),
            dropped=gone,
        )

    @property
    def frozen(self) -> dict[str, TensorRecord]:
        """The tensors that training must not change."""
        return {name: record for name, record in self.tensors.items() if record.frozen}

    @property
    def infos(self) -> dict[str, TensorInfo]:
        """Dtype and shape of every tensor."""
        return {name: record.info for name, record in self.tensors.items()}

    @property
    def algorithm(self) -> str:
        """The digest algorithm of the roots."""
        return algorithm_of(self.root)

    def to_bytes(self) -> bytes:
        """The document as it is published."""
        return self.to_json().encode() + b"\n"

    def require_frozen(self) -> None:
        """Raise ManifestError if nothing is frozen."""
        if not any(record.frozen for record in self.tensors.values()):
            raise ManifestError(self._label, [Problem("tensors", "nothing is frozen: there is nothing to prove")])


def _has_many_tensors(data: object) -> bool:
    tensors = data.get("tensors") if isinstance(data, dict) else None
    return isinstance(tensors, dict) and len(tensors) > _AT_ONCE


def root_of(tensors: Mapping[str, TensorRecord], algorithm: str) -> str:
    """Digest of one compact JSON array a line, ``[name, dtype, shape, frozen, digest]``, sorted by the name's UTF-8.

    A tensor that is frozen in a part has one more item, ``[start, stop, digest]`` of its rows.
    """
    return _digest_of_lines((_line(name, record, record.digest) for name, record in _by_name(tensors)), algorithm)


def frozen_root_of(tensors: Mapping[str, TensorRecord], algorithm: str) -> str:
    """The same over the frozen tensors; of one that is frozen in a part, the digest of the whole is null."""
    lines = (
        _line(name, record, record.digest if record.is_whole else None)
        for name, record in _by_name(tensors)
        if record.frozen
    )
    return _digest_of_lines(lines, algorithm)


def _line(name: str, record: TensorRecord, digest: str | None) -> list[object]:
    rows = [] if record.rows is None else [[record.rows.start, record.rows.stop, record.rows.digest]]
    return [name, record.dtype, list(record.shape), record.frozen, digest, *rows]


def _by_name(tensors: Mapping[str, TensorRecord]) -> list[tuple[str, TensorRecord]]:
    return sorted(tensors.items(), key=lambda item: item[0].encode())


def _digest_of_lines(lines: Iterable[list[object]], algorithm: str) -> str:
    return digest_of([b"".join(canonical_json(line) + b"\n" for line in lines)], algorithm)


def _counts(tensors: Mapping[str, TensorRecord], dropped: tuple[str, ...]) -> Counts:
    records = tensors.values()
    counts: Counts = {
        "frozen": sum(record.frozen for record in records),
        "trainable": sum(not record.frozen for record in records),
        "reinitialised": sum(record.origin == "reinitialised" for record in records),
        "added": sum(record.origin == "added" for record in records),
        "dropped": len(dropped),
    }
    # Of what is rare nothing is said where there is none.
    if cast := sum(record.origin == "cast" for record in records):
        counts["cast"] = cast
    if grafted := sum(record.origin == "grafted" for record in records):
        counts["grafted"] = grafted
    return counts


def _tied(tensors: Mapping[str, TensorRecord]) -> tuple[tuple[str, ...], ...]:
    groups: dict[object, list[str]] = defaultdict(list)
    for name, record in tensors.items():
        if record.frozen and len(record.shape) >= 2:
            groups[record.digest, None if record.rows is None else (record.rows.start, record.rows.stop)].append(name)
    return tuple(tuple(names) for names in groups.values() if len(names) > 1)


def is_file_output(output: Path) -> bool:
    """Whether an output of this name is one file; else it is a folder."""
    return output.name.endswith(".safetensors")


def manifest_path(output: Path) -> Path:
    """Where the manifest of an output stands: ``x.freeze.json`` beside a file, ``freeze.json`` in a folder."""
    return output.with_suffix(".freeze.json") if is_file_output(output) else output / MANIFEST_NAME


_OF_SPEC = "of a spec, `ckptsurg rewrite` makes the output with its manifest, `ckptsurg manifest` the manifest alone"


def load_manifest(path: str | Path) -> Manifest:
    """Read a manifest and check that it agrees with itself.

    Args:
        path: The document; or the output, file or folder, that it stands by.

    Raises:
        ManifestError: if it is not valid, or its roots or counts do not match its tensors.
        UsageError: if there is no such file.
    """
    path = Path(path)
    with system_failures(shown(path)):
        if path.is_dir() or is_file_output(path):
            output, path = path, manifest_path(path)
            if not path.exists():
                raise UsageError(f"{shown(path)}: no such file: {shown(output)} has no manifest")
    raw, label = read_bytes(path, MAX_MANIFEST_BYTES, ManifestError), shown(path)
    try:
        text = Text(label, parse_json(raw.decode("utf-8"), floats=False))
    except UnicodeDecodeError as failure:
        raise ManifestError(
            label, [Problem("", f"not UTF-8: byte {failure.start:,} is 0x{raw[failure.start]:02x}")]
        ) from None
    except ValueError as failure:
        hint = _OF_SPEC if path.suffix in (".yaml", ".yml") else None
        raise ManifestError(label, [Problem("", f"not a manifest: {_other(raw) or failure}")], hint=hint) from None
    if isinstance(text.data, dict) and "frozen_root" not in text.data:
        found = _other(raw) or "it has no frozen_root"
        raise ManifestError(label, [Problem("", f"not a manifest of ckptsurg: {found}")], hint=_OF_SPEC)
    manifest = Manifest.from_text(text)
    problems = list(_contradictions(manifest))
    if problems:
        raise ManifestError(label, problems, hint="the manifest was edited or damaged; take the published one")
    return manifest


def _other(raw: bytes) -> str | None:
    """What a document is that is no manifest, where that is known."""
    try:
        data = parse_json(raw.decode("utf-8"))
    except ValueError:
        return None
    is_ours = isinstance(data, dict) and not {"root", "frozen_root"}.isdisjoint(data)
    known = None if is_ours else known_document(data)
    return None if known is None else f"it is {known}"


def _contradictions(manifest: Manifest) -> Iterable[Problem]:
    for name, record in manifest.tensors.items():
        place = f"tensors.{shown(name)}"
        if reason := unstorable(name, record.info):
            yield Problem(place, reason)
            continue
        rows = record.rows
        if rows and not (record.frozen and record.shape and rows.start < rows.stop <= record.shape[0]):
            yield Problem(f"{place}.rows", f"[{rows.start}:{rows.stop}] is no part of {record.info}")
        elif rows and record.held.elements * DTYPE_BITS[record.dtype] % 8:
            yield Problem(f"{place}.rows", f"[{rows.start}:{rows.stop}] of {record.info} would part a byte")
    counts, counted = dict(manifest.counts), dict(_counts(manifest.tensors, manifest.dropped))
    for key, found, written in (
        ("root", root_of(manifest.tensors, manifest.algorithm), manifest.root),
        ("frozen_root", frozen_root_of(manifest.tensors, manifest.algorithm), manifest.frozen_root),
        *((f"counts.{key}", counted.get(key, 0), counts.get(key, 0)) for key in counted | counts),
    ):
        if found != written:
            yield Problem(key, f"does not match the tensors: the manifest says {written}, they give {found}")
    if sorted(map(tuple, manifest.tied)) != sorted(_tied(manifest.tensors)):
        yield Problem("tied", "does not match the digests of the frozen tensors")
    if both := [
        name
        for name in manifest.dropped
        if (there := manifest.tensors.get(name)) is not None and there.origin != "added" and there.base_name is None
    ]:
        yield Problem("dropped", f"{enumerate_names(both)}: dropped, and yet there")
