"""The errors that a user sees: one sentence that names what is wrong and what to do."""

from collections.abc import Sequence
from pathlib import Path

__all__ = [
    "DatasetError",
    "FileError",
    "FreeAnchorError",
    "LoaderError",
    "check_folder",
    "first_line",
    "shorten",
]

_MOST_NAMED = 5


class FreeAnchorError(Exception):
    """Something that the user gave cannot be used. Commands end with its message alone."""


class DatasetError(FreeAnchorError):
    """A data set cannot be used. The message names the file and says what to do."""


class FileError(FreeAnchorError):
    """A checkpoint or config cannot be used. The message names the file and says what to do."""


class LoaderError(FreeAnchorError):
    """The next batch cannot be loaded. What was trained before is as good as ever."""


def check_folder(folder: str | Path) -> None:
    """Find out before any work whether a folder to be written to is one, or can be made.

    Raises:
        FileError: it, or what it is to be in, is a file.
    """
    folder = Path(folder)
    there = next((x for x in (folder, *folder.parents) if x.exists()), None)
    if there is not None and not there.is_dir():
        raise FileError(f"{folder} cannot be a folder to write to: {there} is a file")


def first_line(error: Exception) -> str:
    """What a library's error says first, or else its kind, for a sentence of our own."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def shorten(names: Sequence[str], separator: str = ", ") -> str:
    """Join the first few of possibly many names or messages, and say how many more there are."""
    more = [f"and {len(names) - _MOST_NAMED} more"] if len(names) > _MOST_NAMED else []
    return separator.join([*names[:_MOST_NAMED], *more])
