"""Saving and loading models: never half a file, and no model that is not what it seems."""

import os
import re
from collections.abc import Sequence
from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from detectron2.utils import comm
from torch import nn

from ..config import value_of
from ..errors import FileError, shorten
from .classes import CLASS_PREDICTOR, keep_known_classes, zoo_classes
from .convert import take_average, to_detectron2
from .converter import MASK_HEAD, is_counter
from .described import BOX_KEYS, described_config, is_described_here, is_same
from .files import (
    CLASS_NAMES,
    CONFIG_KEY,
    find,
    read_checkpoint,
    replacing,
    wants_heuristics,
)
from .run_folder import BEST, checkpoints_in, newest_whole, refuse_best_alone, tag_last
from .timm_weights import from_timm

__all__ = ["Checkpointer"]

# What differs with the classes or the anchors: of one-stage models, and of two stages.
_PREDICTOR = re.compile(
    rf"{CLASS_PREDICTOR.pattern}|^head\.bbox_pred\."
    r"|^proposal_generator\.(?:detector\.head\.(?:cls_score|bbox_pred)"
    r"|rpn_head\.(?:objectness_logits|anchor_deltas))\."
)
# Of batch norm: what Caffe2's weights have in the weight and bias instead.
_STATISTICS = (".running_mean", ".running_var")
_PIXELS = ("pixel_mean", "pixel_std")
# A tensor of a block of Detectron2's ResNets, under whatever prefix.
_RESNET_TENSOR = re.compile(r"(?:^|\.)res\d\.\d+\.")
# Weights of a backbone may lack a few tensors that are trained, which a line of the log names.
_MOST_MISSING = 0.2
# Of deformable convolutions, to begin at 0.
_OFFSET = "_offset."


class Checkpointer(DetectionCheckpointer):
    """Detectron2's checkpointer, which also reads other formats and refuses what does not fit.

    Files are read by :func:`freeanchor.checkpoint.read_checkpoint`, and converted by
    :func:`freeanchor.checkpoint.to_detectron2`.
    """

    def __init__(
        self, model: nn.Module, cfg: CfgNode | None, save_dir: str = "", **checkpointables: Any
    ) -> None:
        """Build the checkpointer of a model.

        Args:
            model: the model, possibly in DistributedDataParallel.
            cfg: the config that it was built with, or None if it was built without one: then a
                warning names the keys that the weights need.
            save_dir: where checkpoints are written and looked for.
            checkpointables: see :class:`detectron2.checkpoint.DetectionCheckpointer`.
        """
        super().__init__(model, save_dir, **checkpointables)
        self.cfg = cfg
        self._is_start = False
        self._other_classes: list[str] = []
        self._is_result = True

    def save(self, name: str, **kwargs: Any) -> None:
        """Write a checkpoint, as a whole or not at all, on the main process.

        It says what its weights need of a config, see :func:`described_config`.

        Args:
            name: of the file, without `.pth`. `--resume` takes the one that was written last,
                except `model_best`.
            kwargs: what to save besides.

        Raises:
            FileError: it cannot be written.
        """
        if not self.save_dir or not self.save_to_disk:
            return
        content = {"model": self.model.state_dict(), CONFIG_KEY: described_config(self.cfg)}
        content.update({key: x.state_dict() for key, x in self.checkpointables.items()}, **kwargs)
        path = os.path.join(self.save_dir, f"{name}.pth")
        self.logger.info(f"Saving checkpoint to {path}")
        with replacing(path) as f:
            torch.save(content, f)
        if name != BEST:
            self.tag_last_checkpoint(f"{name}.pth")

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        tag_last(self.save_dir, last_filename_basename)

    def has_checkpoint(self) -> bool:
        return bool(checkpoints_in(self.save_dir))

    def get_checkpoint_file(self) -> str:
        """The newest checkpoint that is whole, the same on all processes; empty without any.

        Raises:
            FileError: there are checkpoints, and all of them are damaged.
        """
        newest = newest_whole(self.save_dir) if comm.is_main_process() else ""
        return str(comm.all_gather(newest)[0])

    def resume_or_load(self, path: str, *, resume: bool = True) -> dict[str, Any]:
        """Resume from the last checkpoint or, without one, load weights to start training from.

        Raises:
            FileError: see :meth:`load` and :meth:`load_start`; or the best model is all that is
                left of a run.
        """
        # Each process would look into its own OUTPUT_DIR, if machines do not share it.
        last = self.get_checkpoint_file() if resume else ""
        if resume and not last:
            refuse_best_alone(self.save_dir)
        return self.load(last) if last else self.load_start(path)

    def load_start(self, path: str, checkpointables: Sequence[str] | None = ()) -> dict[str, Any]:
        """Load the weights that training starts from: of a backbone or of a detector.

        The predictors of other classes or anchors, and a first convolution of another number of
        channels, stay as they were initialised, and a line of the log says so. Classes that the
        weights know by name keep what was learned of them, see :func:`keep_known_classes`.

        Args:
            path: see :meth:`load`. Without any, a line of the log names what is frozen.
            checkpointables: what else to load, by default nothing; None for all that there is.

        Raises:
            FileError: see :meth:`load`; the weights are not of this backbone, or other tensors
                than those of the predictors are of another shape.
        """
        if not path and (frozen := self._frozen()):
            self.logger.warning(
                "MODEL.WEIGHTS is empty, but FREEZE_AT or NORM of MODEL.BACKBONE, RESNETS or TIMM "
                f"freezes layers, which stay random: {shorten(frozen)}. Give ImageNet weights, or "
                "set FREEZE_AT 0 and a trainable norm"
            )
        self._is_start = True
        try:
            return self.load(path, None if checkpointables is None else list(checkpointables))
        finally:
            self._is_start = False

    def load(self, path: str, checkpointables: list[str] | None = None) -> dict[str, Any]:
        """Load the weights of a whole model.

        Args:
            path: what `MODEL.WEIGHTS` takes. An empty one loads nothing.
            checkpointables: what else to load, by default all that there is.

        Returns:
            What else the file holds.

        Raises:
            FileError: the file cannot be read, its weights need another config, or they are not
                exactly those of this model.
        """
        self.path = path
        wanted = self.checkpointables if checkpointables is None else checkpointables
        self._is_result = "trainer" not in wanted
        checkpoint: dict[str, Any] = super().load(path and find(path), checkpointables)
        return checkpoint

    def _frozen(self) -> list[str]:
        """The weights that are not trained."""
        return [k for k, x in self.model.named_parameters() if not x.requires_grad]

    def _load_file(self, filename: str) -> dict[str, Any]:
        checkpoint = read_checkpoint(filename)
        if self._is_result:
            take_average(checkpoint, filename)
        backbone = from_timm(checkpoint, filename, self.cfg)
        if backbone is not None:
            checkpoint = {"model": backbone[0], CONFIG_KEY: backbone[1]}
        else:
            checkpoint = to_detectron2(checkpoint, filename)
        if wants_heuristics(self.path):
            checkpoint["matching_heuristics"] = True
        if CONFIG_KEY not in checkpoint:
            self._warn_of_retinanet(checkpoint["model"])
        config = checkpoint.pop(CONFIG_KEY, {})
        self._check_classes(config.pop(CLASS_NAMES, []) or zoo_classes(checkpoint))
        self._check_config(config)
        return checkpoint

    def _warn_of_retinanet(self, weights: dict[str, Any]) -> None:
        """Detectron2's RetinaNet has the tensors of a FreeAnchor, but boxes of another scale."""
        of_retinanet = (1.0, 1.0, 1.0, 1.0)
        if (
            self.cfg is not None
            and "head.bbox_pred.weight" in weights
            and tuple(self.cfg.MODEL.RETINANET.BBOX_REG_WEIGHTS) != of_retinanet
        ):
            self.logger.warning(
                f"The weights {self.path} do not say what trained them. If it was Detectron2's "
                f'RetinaNet, set MODEL.RETINANET.BBOX_REG_WEIGHTS "{of_retinanet}"'
            )

    def _check_classes(self, names: list[str]) -> None:
        """Compare the classes of a checkpoint with those of the config, by name."""
        wanted = described_config(self.cfg).get(CLASS_NAMES, [])
        self._other_classes = names if wanted and names != wanted else []
        if self._is_start:
            if self._other_classes:
                self.logger.warning(f"The weights {self.path} are for other classes: {names}")
        elif self._other_classes:
            raise FileError(
                f"The weights {self.path} are for the classes {names}, and those of the config are "
                f'{wanted}: add {CLASS_NAMES} "{names}", and data sets are brought to these by name'
            )
        elif wanted and not names:
            self.logger.warning(
                f"The weights {self.path} do not say which classes they are for. They are taken to "
                f"be, in this order, {wanted}"
            )

    def _check_config(self, config: dict[str, Any]) -> None:
        if self.cfg is None:
            if config:
                self.logger.warning(
                    f"The model was built without a config. See that it has what {self.path} "
                    f"needs: {_options(config)}"
                )
            return
        wrong = {}
        means = config.get("MODEL.PIXEL_MEAN")
        if self._is_start and means and len(means) != len(self.cfg.MODEL.PIXEL_MEAN):
            pixels = ("INPUT.FORMAT", "MODEL.PIXEL_MEAN", "MODEL.PIXEL_STD")
            config = {key: value for key, value in config.items() if key not in pixels}
        for key, value in config.items():
            try:
                own = value_of(self.cfg, key)
            except (KeyError, TypeError) as e:
                raise FileError(
                    f"The weights {self.path} need the config key {key}, which this FreeAnchor "
                    "does not have: they are damaged, or of a newer version"
                ) from e
            if not is_same(own, value) and not (
                self._is_start and key == "MODEL.RETINANET.NUM_CLASSES"
            ):
                wrong[key] = value
        if self._is_start and is_described_here(config):
            boxes = {key: wrong.pop(key) for key in BOX_KEYS if key in wrong}
            if boxes:
                self.logger.warning(
                    f"The weights {self.path} were trained with other boxes: {_options(boxes)}"
                )
        if wrong:
            raise FileError(
                f"The weights {self.path} need another model than the config makes: add "
                f"{_options(wrong)}, "
                "or use their own config, which is the config.yaml of their run or what "
                "`freeanchor convert` writes for them"
            )

    def _load_model(self, checkpoint: Any) -> Any:
        # Detectron2's older checkpoints, its zoo among them, have the values of these two keys.
        for name in _PIXELS:
            theirs, ours = checkpoint["model"].pop(name, None), getattr(self.model, name, None)
            if theirs is not None and ours is not None:
                theirs = torch.as_tensor(theirs).flatten()
                is_same_size = theirs.numel() == ours.numel()
                if not is_same_size and self._is_start:
                    continue
                if not is_same_size or not torch.allclose(theirs, ours.flatten().to(theirs)):
                    raise FileError(
                        f"The weights {self.path} need another model than the config makes: add "
                        f'MODEL.{name.upper()} "{[round(x, 4) for x in theirs.tolist()]}"'
                    )
        if self._other_classes:
            self._keep_known_classes(checkpoint["model"])
        try:
            return super()._load_model(checkpoint)
        except (AssertionError, ValueError) as e:  # of Detectron2's matching of names
            raise FileError(
                f"The weights {self.path} are not of this model: their names are not to be matched "
                f"with those of its tensors ({e or 'two are one'})"
            ) from e

    def _keep_known_classes(self, weights: dict[str, Any]) -> None:
        new, old = described_config(self.cfg)[CLASS_NAMES], self._other_classes
        if changed := keep_known_classes(weights, self.model.state_dict(), old, new):
            known = [x for x in new if x in old]
            anew = [x for x in new if x not in old]
            self.logger.warning(
                f"By their names, {shorten(known)} keep what {self.path} has learned of them"
                + f", and {shorten(anew)} start anew" * bool(anew)
                + f": {', '.join(changed)}"
            )

    def _log_incompatible_keys(self, incompatible: Any) -> None:
        """Judge what :meth:`_load_model` found, of which Detectron2 only warns."""
        names = [k for k in self.model.state_dict() if not is_counter(k)]
        missing = {k for k in incompatible.missing_keys if not is_counter(k)}
        wrong = {k: f"{k} {old} instead of {new}" for k, old, new in incompatible.incorrect_shapes}
        surplus = [k for k in incompatible.unexpected_keys if not is_counter(k)]
        problems = {"missing": sorted(missing), "of another shape": [*wrong.values()]}
        if self._is_start:
            means = getattr(self.model, "pixel_mean", None)
            channels = 3 if means is None else means.numel()
            fitting = {
                k
                for k, old, new in incompatible.incorrect_shapes
                if _PREDICTOR.match(k) or _is_first_convolution(old, new, channels)
            }
            backbone = [k for k in _start_of(names, missing) if _OFFSET not in k]
            lacking = [k for k in backbone if k in missing]
            frozen = self._frozen()
            problems = {
                "missing": lacking if len(lacking) > _MOST_MISSING * len(backbone) else [],
                "frozen by FREEZE_AT of MODEL.BACKBONE or MODEL.TIMM, but random": [
                    k for k in lacking if k in frozen
                ],
                "of another shape": [v for k, v in wrong.items() if k not in fitting],
                "not in the model": [k for k in surplus if _RESNET_TENSOR.search(k)],
            }
        else:
            # A model that finds masks finds boxes without that head.
            is_boxes_alone = self._is_result and self.cfg and not self.cfg.MODEL.MASK_ON
            needless = MASK_HEAD if is_boxes_alone else ()
            problems["not in the model"] = [k for k in surplus if not k.startswith(needless)]
        if any(problems.values()):
            raise FileError(
                f"The weights {self.path} are not of this model: they fill "
                f"{len(names) - len(missing | wrong.keys())} of its {len(names)} tensors. "
                + "; ".join(f"{kind}: {shorten(keys)}" for kind, keys in problems.items() if keys)
            )
        if self._is_start and lacking:
            self.logger.warning(
                f"The weights {self.path} lack a part of the backbone, which starts at random: "
                f"{', '.join(lacking)}"
            )
        initialised = [k for k in names if k in missing or k in wrong]
        self.logger.info(
            f"Loaded {len(names) - len(initialised)} of {len(names)} tensors from {self.path}"
        )
        if initialised:
            self.logger.warning(
                f"Initialised anew: {', '.join(wrong.get(k, k) for k in initialised)}"
            )
        if surplus:
            self.logger.warning(f"In {self.path}, but not in the model: {', '.join(surplus)}")


def _start_of(names: list[str], missing: set[str]) -> list[str]:
    """The tensors of a model that the weights which training starts from must have, mostly."""
    for prefix in ("backbone.bottom_up.", "backbone.", ""):
        if found := [k for k in names if k.startswith(prefix) and not k.endswith(_STATISTICS)]:
            break
    if prefix == "backbone.":
        # One of the user's own: all parts that the weights have something of, as its pyramid may
        # be new.
        parts = {k.split(".")[1] for k in found if k not in missing}
        found = [k for k in found if not parts or k.split(".")[1] in parts]
    return found


def _options(config: dict[str, Any]) -> str:
    """Keys and values as the command line takes them."""
    return " ".join(f'{key} "{value!r}"' for key, value in config.items())


def _is_first_convolution(old: Sequence[int], new: Sequence[int], channels: int) -> bool:
    """Whether the shapes of a weight differ by the channels of the images alone."""
    return (
        len(old) == len(new) == 4
        and new[1] == channels != old[1]
        and (*old[:1], *old[2:]) == (*new[:1], *new[2:])
    )
