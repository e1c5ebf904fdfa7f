"""The errors that a user sees: one sentence that names what is wrong and what to do."""

from collections.abc import Sequence

__all__ = ["DatasetError", "FileError", "FreeAnchorError", "LoaderError", "shorten"]

_MOST_NAMED = 5


class FreeAnchorError(Exception):
    """Something that the user gave cannot be used. Commands end with its message alone."""


class DatasetError(FreeAnchorError):
    """A data set cannot be used. The message names the file and says what to do."""


class FileError(FreeAnchorError):
    """A checkpoint or config cannot be used. The message names the file and says what to do."""


class LoaderError(FreeAnchorError):
    """The next batch cannot be loaded. What was trained before is as good as ever."""


def shorten(names: Sequence[str], separator: str = ", ") -> str:
    """Join the first few of possibly many names or messages, and say how many more there are."""
    more = [f"and {len(names) - _MOST_NAMED} more"] if len(names) > _MOST_NAMED else []
    return separator.join([*names[:_MOST_NAMED], *more])
