"""Data sets of Detectron2's catalogues behind our checks."""

import logging
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils.file_io import PathManager

from ..errors import DatasetError, shorten
from .coco import read_coco
from .coco_file import CocoFile
from .findings import Findings, show
from .records import check_records

__all__ = ["Dataset", "file_of", "register_datasets", "take_over"]

logger = logging.getLogger(__name__)


class Dataset:
    """A data set whose records have passed the checks: what Detectron2's catalogue calls."""

    def __init__(self, name: str, source: Callable[[], Iterable[dict[str, Any]]] | None) -> None:
        """Take over a data set.

        Args:
            name: in Detectron2's catalogues. If it is a COCO file, `json_file` and `image_root` in
                its metadata say which.
            source: what was registered under the name; None for a COCO file.
        """
        self.name = name
        self.is_coco = source is None
        self.findings = Findings()
        self.notes: list[str] = []
        self._source = source
        self._file: tuple[Any, CocoFile] | None = None
        self._classes: dict[str, Any] | None = None
        self._model_classes: dict[str, int] = {}
        self._has_masks = False
        self._reported: set[str] = set()

    @property
    def metadata(self) -> Any:
        """What Detectron2's catalogue knows of it."""
        return MetadataCatalog.get(self.name)

    def image_files(self) -> list[str]:
        """The file of each image."""
        if self.is_coco:
            return self._read().file_names
        return [x["file_name"] for x in self._load()]

    def use_masks(self, wanted: bool) -> None:
        """Have the records the masks of objects, or boxes alone, which is how it begins."""
        if wanted != self._has_masks:
            self._has_masks, self._file = wanted, None

    def _read(self) -> CocoFile:
        """The annotation file, read once and again when it has changed."""
        path = self.metadata.json_file
        status = os.stat(path) if os.path.exists(path) else None
        stamp = status and (status.st_mtime_ns, status.st_size)
        if self._file is None or self._file[0] != stamp:
            file = read_coco(path, self.metadata.image_root, masks=self._has_masks)
            self._file = stamp, file
        return self._file[1]

    def _call_source(self) -> list[dict[str, Any]]:
        """What was registered, as it is."""
        assert self._source is not None
        try:
            return list(self._source())
        except (AssertionError, KeyError, TypeError, ValueError, OSError) as e:
            raise DatasetError(f"{file_of(self.name)} cannot be loaded: {e!r}") from e

    def _load(self) -> list[dict[str, Any]]:
        """What was registered, checked, with its own classes."""
        records, self.findings = check_records(
            self._call_source(), self.name, len(self.classes()), self._has_masks
        )
        return records

    def classes(self) -> dict[str, Any]:
        """The user's id of each of its own classes, in their order; they need not be the model's.

        Raises:
            DatasetError: it cannot be read, or two classes have one name.
        """
        if self._classes is None:
            names = self.metadata.get("thing_classes")
            if names is None and self.is_coco:
                file = self._read()
                self._classes = dict(zip(file.class_names, file.class_ids))
                return self._classes
            if names is None:
                self._call_source()  # Detectron2 learns the classes of some data sets only then
                names = self.metadata.get("thing_classes", [])
            names = list(map(str, names))
            twice = [x for i, x in enumerate(names) if x in names[:i]]
            if twice:
                raise DatasetError(f"{self.name} has the class {show(twice[0])} twice")
            ids = self.metadata.get("thing_dataset_id_to_contiguous_id") or {}
            user_ids = {index: user_id for user_id, index in ids.items()}
            self._classes = {x: user_ids.get(i, i) for i, x in enumerate(names)}
        return self._classes

    def used_classes(self) -> set[str]:
        """Those of its own classes that have boxes."""
        if self.is_coco:
            file = self._read()
            return {file.class_names[i] for i in np.unique(file.classes)}
        names = list(self.classes())
        return {names[a["category_id"]] for x in self._load() for a in x.get("annotations", ())}

    def match(self, class_names: Sequence[str]) -> None:
        """Give the records the classes of a model, by name."""
        own = self.classes()
        self._model_classes = {x: i for i, x in enumerate(class_names)}
        # Detectron2 refuses to change what metadata says.
        vars(self.metadata).update(
            thing_classes=list(class_names),
            thing_dataset_id_to_contiguous_id={
                user_id: self._model_classes[x]
                for x, user_id in own.items()
                if x in self._model_classes
            },
            is_checked=True,  # what is evaluated is its records too, and not its file
        )

    def __call__(self) -> list[dict[str, Any]]:
        """Its records in Detectron2's standard format, made afresh.

        Raises:
            DatasetError: it cannot be read.
        """
        if not self._model_classes:
            self.match(list(self.classes()))
        if self.is_coco:
            file = self._read()
            unknown = [x for x in file.class_names if x not in self._model_classes]
            if unknown and self.used_classes() & set(unknown):
                raise DatasetError(f"{file.path} has other classes than before: {shorten(unknown)}")
            return file.records([self._model_classes.get(x, -1) for x in file.class_names])
        indices = [self._model_classes.get(x, -1) for x in self.classes()]
        records = self._load()
        for record in records:
            for annotation in record.get("annotations", ()):
                annotation["category_id"] = indices[annotation["category_id"]]
        return records

    def report(self) -> None:
        """Log what the checks found, each line once."""
        findings = self._read().findings if self.is_coco else self.findings
        for line in [*findings.lines(), *self.notes]:
            if line not in self._reported:
                self._reported.add(line)
                logger.warning(f"{file_of(self.name)}: {line}")


def file_of(name: str) -> str:
    """The annotation file of a data set, or else its name, for messages."""
    return str(MetadataCatalog.get(name).get("json_file", name))


def register_datasets(datasets: Sequence[Sequence[str]], masks: bool = False) -> None:
    """Register data sets in COCO format with Detectron2. Doing so twice is fine.

    Args:
        datasets: (name, annotation file, image directory) triples.
        masks: whether to read masks, as :func:`freeanchor.data.resolve_classes` says in the end.

    Raises:
        DatasetError: a name is taken, the file or directory is missing, or the file cannot be used,
            see :func:`freeanchor.data.read_coco`.
    """
    for name, json_file, image_root in datasets:
        if not name.strip():
            raise DatasetError(f"--dataset {name!r} {json_file}: the name is empty, give it one")
        if name in DatasetCatalog.list():
            known = MetadataCatalog.get(name)
            if (known.get("json_file"), known.get("image_root")) == (json_file, image_root):
                continue
            raise DatasetError(f"--dataset {name}: this name is taken, choose another one")
        if not PathManager.isdir(image_root):
            raise DatasetError(f"--dataset {name}: there is no image directory {image_root}")
        dataset = Dataset(name, None)
        dataset.use_masks(masks)
        MetadataCatalog.get(name).set(
            json_file=json_file, image_root=image_root, evaluator_type="coco"
        )
        try:
            dataset.match(list(dataset.classes()))
        except DatasetError as e:
            MetadataCatalog.remove(name)
            raise DatasetError(f"--dataset {name}: {e}") from e
        DatasetCatalog.register(name, dataset)


def take_over(name: str) -> Dataset:
    """Put a registered data set behind the checks, if it is not there yet.

    Raises:
        DatasetError: it is not registered.
    """
    if name not in DatasetCatalog.list():
        raise DatasetError(
            f"data set {name} is not known: register it with --dataset {name} ANNOTATIONS.json "
            f"IMAGE_DIR, or use one of {shorten(DatasetCatalog.list())}"
        )
    source = DatasetCatalog[name]
    if isinstance(source, Dataset):
        return source
    metadata = MetadataCatalog.get(name)
    # What `register_coco_instances` has registered, Detectron2's own data sets among it.
    is_coco = metadata.get("evaluator_type") == "coco" and bool(
        metadata.get("json_file") and metadata.get("image_root")
    )
    DatasetCatalog[name] = dataset = Dataset(name, None if is_coco else source)
    return dataset
