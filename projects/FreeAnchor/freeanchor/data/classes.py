"""Model and data sets agree on the classes, by their names."""

from collections.abc import Sequence

from detectron2.config import CfgNode

from ..config import scored_part
from ..errors import DatasetError, shorten
from .catalog import Dataset, file_of, take_over
from .findings import show

__all__ = ["NUM_CLASSES_FROM_DATA", "resolve_classes"]

# The value of NUM_CLASSES that stands for "as many as the data set has".
NUM_CLASSES_FROM_DATA = 0


def resolve_classes(cfg: CfgNode, names: Sequence[str]) -> None:
    """Make model and data sets agree on the classes.

    The model's are `MODEL.FREEANCHOR.CLASS_NAMES` or, where that is empty, those of the first data
    set. Every data set is brought to them by name: it may have them in another order, under other
    ids, or only some of them.

    Args:
        cfg: its `MODEL.FREEANCHOR.CLASS_NAMES` and `MODEL.RETINANET.NUM_CLASSES`, of a two-stage
            model `MODEL.ROI_HEADS.NUM_CLASSES`, are set.
        names: the data sets to be used, training first.

    Raises:
        DatasetError: there is no data set, one is not registered, or one has boxes of classes that
            the model does not have.
    """
    if not names:
        raise DatasetError(
            "there is no data set: name one in DATASETS.TRAIN, or with --eval-only in DATASETS.TEST"
        )
    datasets = [take_over(name) for name in names]
    _choose_masks(cfg, datasets)
    model = [str(x) for x in cfg.MODEL.FREEANCHOR.CLASS_NAMES]
    part, node = scored_part(cfg)
    key, number = f"{part}.NUM_CLASSES", node.NUM_CLASSES
    whose = "the model (MODEL.FREEANCHOR.CLASS_NAMES)" if model else names[0]
    if model:
        if len(set(model)) < len(model) or number not in (NUM_CLASSES_FROM_DATA, len(model)):
            raise DatasetError(
                f"MODEL.FREEANCHOR.CLASS_NAMES must be {number} different names, as "
                f"{key} says, and is {show(model)}"
            )
    else:
        model = list(datasets[0].classes())
        if number not in (NUM_CLASSES_FROM_DATA, len(model)):
            raise DatasetError(
                f"{key} is {number}, but {names[0]} has {len(model)} classes: leave the key out "
                "(in a script set it to 0) to take the number from the data"
            )
    if cfg.MODEL.FREEANCHOR.CLASS_NAMES:
        remedy = (
            f'train a model for it (MODEL.FREEANCHOR.CLASS_NAMES "[]" {key} 0 takes its classes)'
        )
    else:
        of_all = list(dict.fromkeys(x for dataset in datasets for x in dataset.classes()))
        remedy = f'have a model for all of them by MODEL.FREEANCHOR.CLASS_NAMES "{of_all}"'
    for dataset in datasets:
        _check_match(dataset, model, whose, remedy)
        dataset.match(model)
    cfg.MODEL.FREEANCHOR.CLASS_NAMES = model
    node.NUM_CLASSES = len(model)


def _choose_masks(cfg: CfgNode, datasets: Sequence[Dataset]) -> None:
    names = [x.name for x in datasets if x.is_coco]
    if cfg.MODEL.KEYPOINT_ON and names:
        raise DatasetError(
            f"MODEL.KEYPOINT_ON: only boxes and masks of {shorten(names)} are read; use "
            "Detectron2's own tools for keypoints"
        )
    for dataset in datasets:
        dataset.use_masks(cfg.MODEL.MASK_ON)


def _check_match(dataset: Dataset, model: Sequence[str], whose: str, remedy: str) -> None:
    own = list(dataset.classes())
    surplus, missing = [x for x in own if x not in model], [x for x in model if x not in own]
    if surplus:
        used = dataset.used_classes()
        unused = [x for x in surplus if x not in used]
        surplus = [x for x in surplus if x in used]
        if unused and not surplus:
            dataset.notes.append(
                f"these of its classes have no boxes, and the model lacks them: {_list(unused)}"
            )
    if surplus or len(missing) == len(model):
        folded = {x.strip().casefold() for x in missing}
        alike = any(x.strip().casefold() in folded for x in surplus)
        raise DatasetError(
            f"{file_of(dataset.name)} has classes that {whose} does not have: "
            f"{_list(surplus or own)}; "
            + (f"it lacks {_list(missing)}; " if missing else "")
            + ("write them alike, also in case, " if alike else "")
            + f"correct its `categories`, or {remedy}"
        )
    if missing:
        dataset.notes.append(
            f"it does not have these classes of the model: {_list(missing)}; they are not "
            "evaluated, and in training what is of them is background"
        )


def _list(names: Sequence[str]) -> str:
    return shorten([show(x) for x in names])
