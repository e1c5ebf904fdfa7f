#!/usr/bin/env python
r"""Train and evaluate FreeAnchor: Detectron2's `tools/train_net.py` for this project.

Examples::

    train_net.py --config-file configs/COCO-Detection/free_anchor_R_50_FPN_1x.yaml --num-gpus 8
    train_net.py --config-file ... --eval-only MODEL.WEIGHTS model_final.pth
    train_net.py --config-file ... --dataset my_train train.json images/ \
        --dataset my_val val.json images/ DATASETS.TRAIN "('my_train',)" DATASETS.TEST "('my_val',)"
"""

import argparse
import logging
import os
import re
from typing import Any

# Before Detectron2: it makes 0.6 work with today's packages, and registers the architecture.
import freeanchor  # isort: skip
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.data import build_detection_test_loader, build_detection_train_loader
from detectron2.engine import DefaultTrainer, default_argument_parser, default_setup, launch
from detectron2.evaluation import DatasetEvaluators, verify_results
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from freeanchor import data, files
from freeanchor.checkpoint import Checkpointer
from freeanchor.evaluation import BoxEvaluator, NMSRecallEvaluator
from freeanchor.tta import MultiScaleTest
from torch.multiprocessing import ProcessRaisedException

logger = logging.getLogger("freeanchor.train_net")


class Trainer(DefaultTrainer):
    """Detectron2's trainer, on checked data and with COCO evaluation."""

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> Any:
        return build_detection_train_loader(
            cfg,
            mapper=data.Mapper(cfg, is_train=True),
            dataset=data.load_training_set(
                cfg.DATASETS.TRAIN, cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS
            ),
        )

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> Any:
        return build_detection_test_loader(
            cfg, dataset_name, mapper=data.Mapper(cfg, is_train=False)
        )

    @classmethod
    def test(cls, cfg: CfgNode, model: torch.nn.Module) -> dict[str, Any]:
        """Evaluate as the config says: at one scale, and with TEST.AUG.ENABLED at several."""
        results: dict[str, Any] = super().test(
            cfg, model, [evaluators(cfg, name, model) for name in cfg.DATASETS.TEST]
        )
        if cfg.TEST.AUG.ENABLED:
            logger.info("Evaluating with test-time augmentation")
            augmented = super().test(
                cfg,
                MultiScaleTest(cfg, model),
                [box_evaluator(cfg, name, "inference_TTA") for name in cfg.DATASETS.TEST],
            )
            several = len(cfg.DATASETS.TEST) > 1  # then the tasks are under the data sets
            for name in cfg.DATASETS.TEST if several else ("",):
                tasks, more = (results[name], augmented[name]) if several else (results, augmented)
                tasks.update({f"{task}_TTA": result for task, result in more.items()})
        return results

    def build_hooks(self) -> list[Any]:
        # Before the hooks take the checkpointer that Detectron2 has built.
        self.checkpointer = Checkpointer(
            self.checkpointer.model,
            self.cfg,
            self.cfg.OUTPUT_DIR,
            **self.checkpointer.checkpointables,
        )
        hooks: list[Any] = super().build_hooks()
        return hooks


def box_evaluator(cfg: CfgNode, dataset_name: str, folder: str) -> BoxEvaluator:
    """Of COCO AP, into a folder of the output."""
    return BoxEvaluator(dataset_name, output_dir=os.path.join(cfg.OUTPUT_DIR, folder, dataset_name))


def evaluators(cfg: CfgNode, dataset_name: str, model: torch.nn.Module) -> DatasetEvaluators:
    """All that the config asks for of one data set."""
    wanted: list[Any] = [box_evaluator(cfg, dataset_name, "inference")]
    if cfg.TEST.NMS_RECALL:
        wanted.append(NMSRecallEvaluator(dataset_name, model))
    return DatasetEvaluators(wanted)


def build_config(args: argparse.Namespace) -> CfgNode:
    """Read the config and register the data sets; an error if they do not fit together."""
    cfg = get_cfg()
    freeanchor.add_freeanchor_config(cfg)
    cfg.MODEL.RETINANET.NUM_CLASSES = data.NUM_CLASSES_FROM_DATA
    files.merge_config(cfg, args.config_file)
    cfg.merge_from_list(args.opts)
    if not torch.cuda.is_available():
        cfg.MODEL.DEVICE = "cpu"
        cfg.SOLVER.AMP.ENABLED = False  # Detectron2's AMP trainer is for CUDA only
    data.register_datasets(args.dataset)
    data.resolve_num_classes(cfg, dataset_names(cfg, args))
    cfg.freeze()
    return cfg


def dataset_names(cfg: CfgNode, args: argparse.Namespace) -> list[str]:
    """The data sets that this run needs, training first."""
    return [*(() if args.eval_only else cfg.DATASETS.TRAIN), *cfg.DATASETS.TEST]


def check(args: argparse.Namespace) -> None:
    """Find what would stop the run later, once and before any process is launched.

    Raises:
        DatasetError: see :mod:`freeanchor.data`.
        FileError: the config or the weights, see :mod:`freeanchor.files`.
        SystemExit: the config and the command line do not go together.
    """
    cfg = build_config(args)
    if args.eval_only:
        if not cfg.MODEL.WEIGHTS and not args.resume:
            raise SystemExit("train_net.py: --eval-only needs MODEL.WEIGHTS, or --resume")
    elif not cfg.DATASETS.TRAIN:
        raise SystemExit("train_net.py: DATASETS.TRAIN is empty, so there is nothing to train on")
    world_size = cfg.SOLVER.REFERENCE_WORLD_SIZE
    if world_size and not args.eval_only and cfg.SOLVER.IMS_PER_BATCH % world_size:
        raise SystemExit(
            f"train_net.py: SOLVER.IMS_PER_BATCH {cfg.SOLVER.IMS_PER_BATCH} is no multiple of "
            f"SOLVER.REFERENCE_WORLD_SIZE {world_size}, the number of GPUs that the config is "
            "for: add SOLVER.REFERENCE_WORLD_SIZE 0 to have your values taken as they are"
        )
    for name in dataset_names(cfg, args):
        data.check_images([name])
    if cfg.MODEL.WEIGHTS and not args.resume:
        files.find(cfg.MODEL.WEIGHTS)


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Train, or evaluate with --eval-only, in one of the launched processes."""
    cfg = build_config(args)
    default_setup(cfg, args)
    setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="freeanchor")
    if not torch.cuda.is_available():
        logger.warning("There is no CUDA GPU: running on the CPU, in one process, without AMP")
    if args.eval_only:
        model = Trainer.build_model(cfg)
        checkpointer = Checkpointer(model, cfg, cfg.OUTPUT_DIR)
        resume = args.resume and checkpointer.has_checkpoint()
        checkpointer.load(
            checkpointer.get_checkpoint_file() if resume else cfg.MODEL.WEIGHTS, checkpointables=[]
        )
        export(args, cfg, model)
        results: dict[str, Any] = Trainer.test(cfg, model)
        if comm.is_main_process():
            verify_results(cfg, results)
        return results
    if not cfg.MODEL.WEIGHTS and cfg.MODEL.BACKBONE.FREEZE_AT > 0 and not args.resume:
        logger.warning(
            "MODEL.WEIGHTS is empty, but MODEL.BACKBONE.FREEZE_AT freezes the first layers: they "
            "stay random. Give ImageNet weights, or set FREEZE_AT 0 and a trainable norm"
        )
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    trained: dict[str, Any] = trainer.train()
    export(args, cfg, trainer.checkpointer.model)
    return trained


def export(args: argparse.Namespace, cfg: CfgNode, model: torch.nn.Module) -> None:
    """Write what --export-safetensors asks for."""
    if args.export_safetensors and comm.is_main_process():
        path = os.path.join(cfg.OUTPUT_DIR, "model_final.safetensors")
        files.write_checkpoint(path, model.state_dict(), {})
        logger.info(f"Exported the weights to {path}")


def parse_args() -> argparse.Namespace:
    """Parse the command line, and refuse what cannot run."""
    parser = default_argument_parser()
    data.add_dataset_argument(parser)
    parser.add_argument(
        "--export-safetensors",
        action="store_true",
        help="also write the weights, trained or with --eval-only, to model_final.safetensors",
    )
    args = parser.parse_args()
    if not os.path.isfile(args.config_file):
        parser.error(f"--config-file: there is no file {args.config_file!r}")
    if not torch.cuda.is_available():
        if args.num_machines > 1:
            parser.error("--num-machines: several machines need CUDA GPUs, and there is none")
        args.num_gpus = 1  # one process, on the CPU
    elif args.num_gpus > torch.cuda.device_count():
        parser.error(f"--num-gpus {args.num_gpus}: this machine has {torch.cuda.device_count()}")
    return args


def run(args: argparse.Namespace) -> None:
    """Check, launch, and end an error of data or files in one sentence."""
    try:
        check(args)
        launch(
            main,
            args.num_gpus,
            num_machines=args.num_machines,
            machine_rank=args.machine_rank,
            dist_url=args.dist_url,
            args=(args,),
        )
    except (data.DatasetError, files.FileError, ProcessRaisedException) as e:
        # Processes and data loader workers pass errors on as text, which ends in the message.
        *_, message = re.split(r"freeanchor\.(?:data\.Dataset|files\.File)Error: ", str(e))
        if isinstance(e, ProcessRaisedException) and message == str(e):
            raise
        raise SystemExit(f"train_net.py: {message.strip()}") from e


if __name__ == "__main__":
    run(parse_args())
