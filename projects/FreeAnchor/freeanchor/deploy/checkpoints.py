"""What a checkpoint is found by: a run, a file, a config, a name of the zoo or of the Hub."""

from contextlib import suppress
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog

from .. import model_zoo
from ..checkpoint import config_beside, find
from ..checkpoint.run_folder import BEST, checkpoints_in
from ..config import CONFIGS, read_config, scored_part
from ..errors import FileError

__all__ = ["class_names", "find_checkpoint"]

_HUB = "hf://"
_WEIGHTS = (".pth", ".safetensors")


def find_checkpoint(source: str | Path | CfgNode, weights: str | Path = "") -> CfgNode:
    """Find the config of a trained model, with its weights in `MODEL.WEIGHTS`.

    Args:
        source: one of

            - the folder of a run, `OUTPUT_DIR` of `train_net.py`;
            - a file of weights, with its config beside it: of the same name, as `freeanchor
              convert` writes it, or the `config.yaml` of the run;
            - `hf://OWNER/REPO`, as `freeanchor push` fills it, or `hf://OWNER/REPO/FILE` with the
              weights in another file;
            - a config file, or a name in :mod:`freeanchor.model_zoo`;
            - a config.
        weights: what `MODEL.WEIGHTS` takes, instead of those that belong to the source.

    Returns:
        A config of its own, not frozen.

    Raises:
        FileError: there is no such thing, or it has no config or no weights.
    """
    if isinstance(source, CfgNode):
        cfg = source.clone()
    elif str(source).startswith(_HUB):
        cfg = _read_from_hub(str(source))
    else:
        cfg = _read(Path(source))
    cfg.defrost()
    if weights:
        cfg.MODEL.WEIGHTS = str(weights)
    if not cfg.MODEL.WEIGHTS:
        raise FileError(
            f"{'The config' if isinstance(source, CfgNode) else source} names no "
            "weights: give them too"
        )
    return cfg


def _read_from_hub(source: str) -> CfgNode:
    repository = _HUB + "/".join(source.removeprefix(_HUB).split("/")[:2])
    cfg = read_config(find(f"{repository}/config.yaml"))
    cfg.MODEL.WEIGHTS = source
    with suppress(FileError):  # a repository need not have them
        find(f"{repository}/thresholds.json")
    return cfg


def _read(source: Path) -> CfgNode:
    if source.is_dir():
        if not (source / "config.yaml").is_file():
            raise FileError(f"{source} has no config.yaml: it is not the output of a training")
        cfg = read_config(source / "config.yaml")
        # Not MODEL.WEIGHTS of the config, from which the training started.
        cfg.MODEL.WEIGHTS = str(_newest_weights(source))
    elif source.suffix in _WEIGHTS and source.is_file():
        config = config_beside(source)
        if config is None:
            raise FileError(
                f"{source} has no config beside it, neither {source.stem}.yaml nor "
                "config.yaml: give the config, and these as its weights"
            )
        cfg = read_config(config)
        cfg.MODEL.WEIGHTS = str(source)
    elif source.is_file():
        cfg = read_config(source)
    elif (CONFIGS / source).is_file():
        cfg = model_zoo.get_config(source.as_posix(), trained=True)
    else:
        raise FileError(
            f"There is no {source}: give the folder of a run, weights with their "
            "config beside them, a config or a name in the model zoo"
        )
    return cfg


def _newest_weights(folder: Path) -> Path:
    """The weights of a run: what `--resume` would go on from, or else those exported in the end."""
    for path in (*checkpoints_in(folder), folder / "model_final.safetensors"):
        if path.is_file():
            return path
    best = folder / f"{BEST}.pth"
    raise FileError(
        f"{folder} has no checkpoint of its training"
        + (
            f", only {best.name}: name that file"
            if best.is_file()
            else "; if it is of an evaluation alone, give the folder of the training"
        )
    )


def class_names(cfg: CfgNode) -> list[str]:
    """Names of the classes of a model, in its order; "class 0", ... where nothing tells them."""
    number = scored_part(cfg)[1].NUM_CLASSES
    # Data sets that Detectron2 itself knows have their names there.
    known = [cfg.MODEL.FREEANCHOR.CLASS_NAMES]
    known += [
        MetadataCatalog.get(x).get("thing_classes", [])
        for x in cfg.DATASETS.TRAIN
        if x in MetadataCatalog.list()
    ]
    return next((list(x) for x in known if len(x) == number), [f"class {i}" for i in range(number)])
