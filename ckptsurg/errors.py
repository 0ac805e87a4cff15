"""Every error that ckptsurg raises on purpose.

* CkptsurgError
  + UsageError              2  a path that is not there, an output that is, arguments that do not fit
  + DocumentError           2  a spec, manifest or name map that is not valid; holds every problem found
    - SpecError
    - ManifestError
  + FreezeError             2  a live model that cannot be made to obey its manifest
  + CheckpointError         3  a checkpoint that is malformed or unreadable
  + SystemFailure           4  the system failed: disk full, permission, I/O
  + PeerFailed              4  another rank of a run has failed; the number is that of its error, else 4
  + FrozenWeightsChanged    1  a frozen tensor does not have its bits, or is about to lose them

The number is the exit code of the command line. ``hint`` says what to do next.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from .wording import shown

__all__ = [
    "CheckpointError",
    "CkptsurgError",
    "DocumentError",
    "FreezeError",
    "FrozenWeightsChanged",
    "ManifestError",
    "PeerFailed",
    "Problem",
    "SpecError",
    "SystemFailure",
    "UsageError",
    "system_failures",
]


class CkptsurgError(Exception):
    """Base of all errors of ckptsurg.

    Attributes:
        exit_code: What the command line exits with.
        message: What is wrong.
        hint: The next step for the user, or None.
    """

    exit_code: int = 2

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message, self.hint = message, hint

    def __str__(self) -> str:
        if self.hint is None:
            return self.message
        return f"{self.message}\nhint: {self.hint}" if "\n" in self.message else f"{self.message} (hint: {self.hint})"


class UsageError(CkptsurgError):
    """A path that is not there, an output that is, or arguments that do not go together."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing wrong in a document.

    Attributes:
        path: Where in the document, such as ``reinit[0].init``; empty for the document itself.
        message: What is wrong, and what would be right.
        line: Line number in the file, from 1, where it is known.
        place: The path as keys and positions.
    """

    path: str
    message: str
    line: int | None = None
    place: tuple[str | int, ...] = ()

    def describe(self, label: str) -> str:
        place = label if self.line is None else f"{label}:{self.line}"
        return ": ".join(part for part in (place, self.path, self.message) if part)


class DocumentError(CkptsurgError):
    """A document that is not valid. All problems are reported at once.

    Attributes:
        problems: What is wrong, in the order of the document.
    """

    def __init__(self, label: str, problems: Sequence[Problem], *, hint: str | None = None) -> None:
        ordered = sorted(problems, key=lambda problem: problem.line or 0)
        super().__init__("\n".join(problem.describe(label) for problem in ordered), hint=hint)
        self.problems = tuple(ordered)


class SpecError(DocumentError):
    """A spec that is not valid, or that does not fit the checkpoint."""


class ManifestError(DocumentError):
    """A manifest that is not valid, or that does not fit what it is used for."""


class FreezeError(CkptsurgError):
    """A live model that cannot be made to obey the manifest, or be compared with it.

    ``freeze`` raises it before it changes anything.
    """


class CheckpointError(CkptsurgError):
    """A checkpoint that is malformed or unreadable."""

    exit_code = 3


class SystemFailure(CkptsurgError):
    """The system failed: disk full, permission denied, I/O error."""

    exit_code = 4


class PeerFailed(CkptsurgError):
    """Another rank of a run has failed, so that all of them stop.

    Attributes:
        rank: Which one, from 0.
        exit_code: That of its error.
    """

    exit_code = 4

    def __init__(self, rank: int, message: str, *, hint: str | None = None, exit_code: int = 4) -> None:
        super().__init__(f"rank {rank}: {message}", hint=hint)
        self.rank, self.exit_code = rank, exit_code


class FrozenWeightsChanged(CkptsurgError):
    """A frozen tensor has not its bits any more, or a step would move it, or step what the model no longer has.

    Attributes:
        causes: The cause code of each tensor, where one is settled.
        ranks: Of each tensor the ranks whose part of it moved, where several processes train and that is known.
    """

    exit_code = 1

    def __init__(
        self,
        message: str,
        *,
        hint: str | None = None,
        causes: Mapping[str, str] | None = None,
        ranks: Mapping[str, Sequence[int]] | None = None,
    ) -> None:
        super().__init__(message, hint=hint)
        self.causes = dict(causes or {})
        self.ranks = {name: tuple(where) for name, where in (ranks or {}).items()}


@contextmanager
def system_failures(label: str, consequence: str = "") -> Iterator[None]:
    """Turn errors of the operating system into SystemFailure.

    Args:
        label: What was worked on.
        consequence: Said at the end of the message.
    """
    try:
        yield
    except OSError as failure:
        name = f" ({shown(failure.filename)})" if failure.filename else ""
        reason = f"{label}: {failure.strerror or failure}{name}"
        raise SystemFailure(f"{reason}; {consequence}" if consequence else reason) from failure
