"""Finding the images that an annotation file names, and never others."""

import os
import unicodedata
from collections.abc import Iterator
from urllib.parse import unquote

from ..errors import DatasetError
from .findings import show

__all__ = ["ImageFolder"]


def _fold(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


class ImageFolder:
    """The folder of a data set's images, on the disk or elsewhere (`s3://`, then taken as it is).

    A name is looked for as it stands; then with Windows' backslashes, %-encoding, the name of the
    folder repeated in front, and letters of another case taken for what they mean. Nothing
    outside the folder is ever given, though links that lie in it are followed.
    """

    def __init__(self, root: str) -> None:
        """Take a folder; it is listed when it is first looked into."""
        self.root = root
        self._is_local = "://" not in root
        self._real_root = os.path.realpath(root) if self._is_local else root
        self._listed: dict[str, tuple[set[str], dict[str, list[str]]]] = {}

    def find(self, name: str) -> tuple[str, bool]:
        """Find an image.

        Args:
            name: `file_name` of the annotation file.

        Returns:
            Its path, which may not exist, and whether it is there by another name than `name`.

        Raises:
            DatasetError: the name leads out of the folder.
        """
        if not self._is_local:
            if ".." in name.replace("\\", "/").split("/") or name.startswith("/"):
                raise DatasetError(f"{show(name)} leads out of the image folder {self.root}")
            return f"{self.root.rstrip('/')}/{name}", False
        plain = not (name.startswith("/") or "\\" in name or "%" in name or "." in name[:1])
        if plain and "/." not in name and self._is_there(name):
            return os.path.join(self.root, name), False
        for variant in self._variants(name):
            inside = self._inside(variant)
            if self._is_there(inside):
                return os.path.join(self.root, inside), variant != name
        for variant in self._variants(name):
            found = self._of_another_case(self._inside(variant))
            if found is not None:
                return os.path.join(self.root, found), True
        return os.path.join(self.root, self._inside(name)), False

    def _variants(self, name: str) -> Iterator[str]:
        """The name, and others that it may mean, without one twice."""
        seen = set()
        root_parts = os.path.abspath(self.root).split(os.sep)
        for text in (name, name.replace("\\", "/"), unquote(name.replace("\\", "/"))):
            parts = [x for x in text.split("/") if x not in ("", ".")]
            stripped = [
                "/".join(parts[n:])
                for n in range(1, min(len(parts), len(root_parts)))
                if parts[:n] == root_parts[-n:] and not text.startswith("/")
            ]
            for variant in (text, *stripped):
                if variant not in seen:
                    seen.add(variant)
                    yield variant

    def _inside(self, name: str) -> str:
        """The path relative to the folder, without `..`; an error if it is not in the folder."""
        if "\0" in name or any(0xD800 <= ord(c) < 0xDC80 or 0xDCFF < ord(c) < 0xE000 for c in name):
            raise DatasetError(f"{show(name)} is no file name")
        parts = name.split("/")
        if ".." not in parts and not name.startswith("/"):
            return "/".join(x for x in parts if x not in ("", "."))
        # Text and links can both lead out: `link/..` is beside what the link points to.
        real = os.path.realpath(os.path.join(self._real_root, name))
        relative = os.path.relpath(real, self._real_root)
        if relative == ".." or relative.startswith(f"..{os.sep}"):
            raise DatasetError(
                f"{show(name)} leads out of the image folder {self.root}: give the folder that "
                "holds all images, and file names relative to it"
            )
        return relative

    def _list(self, folder: str) -> tuple[set[str], dict[str, list[str]]]:
        """The names in a folder: as they are, and by what does not depend on case."""
        if folder not in self._listed:
            try:
                names = os.listdir(os.path.join(self.root, folder))
            except (OSError, ValueError):
                names = []
            self._listed[folder] = (set(names), {})
        names_there, by_fold = self._listed[folder]
        return names_there, by_fold

    def _is_there(self, name: str) -> bool:
        folder, _, last = name.rpartition("/")
        return last in self._list(folder)[0]

    def _of_another_case(self, name: str) -> str | None:
        """The one file that has this name but for the case of letters or their composition."""
        folder, _, last = name.rpartition("/")
        names, by_fold = self._list(folder)
        if names and not by_fold:
            for other in names:
                by_fold.setdefault(_fold(other), []).append(other)
        found = by_fold.get(_fold(last), [])
        return f"{folder}/{found[0]}".lstrip("/") if len(found) == 1 else None
