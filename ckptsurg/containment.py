"""Files of a folder that are in it, links followed."""

from __future__ import annotations

from pathlib import Path

from .errors import CheckpointError, UsageError
from .wording import shown

__all__ = ["contained"]


def contained(path: Path, folder: Path, missing: str | None = None) -> Path:
    """Where a file of a folder is. Links may stay in it, or lead from a Hugging Face cache's snapshots/ to its blobs/.

    What is returned was checked, so it is what is to be opened: no link is followed again.

    Args:
        path: Of a file of the folder.
        folder: The folder.
        missing: What to say where there is no such file.

    Returns:
        The path with no link left in it.

    Raises:
        CheckpointError: if it leads elsewhere, or is missing and that is to be said.
        UsageError: if it is missing otherwise.
    """
    try:
        real, home = path.resolve(strict=True), folder.resolve(strict=True)
    except (FileNotFoundError, NotADirectoryError):
        if missing is None:
            raise UsageError(f"{shown(path)}: no such file") from None
        raise CheckpointError(missing, hint="fetch it, or save the checkpoint again") from None
    except (OSError, RuntimeError) as failure:
        raise CheckpointError(f"{shown(path)}: cannot be followed: {shown(failure)}") from None
    # models--org--name/snapshots/REVISION/... links to models--org--name/blobs/.
    snapshots = [place for place in home.parents if place.name == "snapshots"]
    allowed = [home, *(place.parent / "blobs" for place in snapshots[:1])]
    if not any(real.is_relative_to(place) for place in allowed):
        raise CheckpointError(
            f"{shown(path)}: is a link that leaves the folder, to {shown(real)}",
            hint="put the file itself in its place",
        )
    return real
