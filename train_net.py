#!/usr/bin/env python
r"""Train and evaluate FreeAnchor: Detectron2's `tools/train_net.py` for this project.

Examples::

    train_net.py --config-file configs/COCO-Detection/free_anchor_R_50_FPN_1x.yaml --num-gpus 8
    torchrun --nproc-per-node 2 train_net.py --config-file ...
    train_net.py --config-file ... --resume
    train_net.py --config-file ... --eval-only MODEL.WEIGHTS model_final.pth
    train_net.py --config-file ... --dataset my_train train.json images/ \
        --dataset my_val val.json images/ DATASETS.TRAIN "('my_train',)" DATASETS.TEST "('my_val',)"
"""

import argparse
import logging
import os
from typing import Any

# Before Detectron2: it makes 0.6 work with today's packages, and registers the architecture.
import freeanchor  # noqa: F401  # isort: skip
from detectron2.config import CfgNode
from detectron2.utils import comm
from freeanchor.checkpoint import Checkpointer, described_config, write_checkpoint
from freeanchor.engine import Trainer, argument_parser, launch, setup, verify
from torch import nn

logger = logging.getLogger("freeanchor.train_net")


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Train, or evaluate with --eval-only, in one of the launched processes."""
    cfg = setup(args)
    results: dict[str, Any]
    if args.eval_only:
        model = Trainer.build_model(cfg)
        checkpointer = Checkpointer(model, cfg, cfg.OUTPUT_DIR)
        last = checkpointer.get_checkpoint_file() if args.resume else ""
        checkpointer.load(last or cfg.MODEL.WEIGHTS, checkpointables=[])
        export(args, cfg, model)
        results = Trainer.test(cfg, model)
        if comm.is_main_process():
            verify(cfg, results)
        return results
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    results = trainer.train()
    export(args, cfg, trainer.evaluated_model)
    return results


def export(args: argparse.Namespace, cfg: CfgNode, model: nn.Module) -> None:
    """Write what --export-safetensors asks for."""
    if args.export_safetensors and comm.is_main_process():
        path = os.path.join(cfg.OUTPUT_DIR, "model_final.safetensors")
        write_checkpoint(path, model.state_dict(), described_config(cfg))
        logger.info(f"Exported the weights to {path}")


if __name__ == "__main__":
    launch(main, argument_parser().parse_args())
