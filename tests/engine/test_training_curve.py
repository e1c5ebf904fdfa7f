"""The losses of a short run are those that are stored: a change of training is seen.

The run is in float64 from weights that NumPy drew, as PyTorch's random numbers depend on the
instruction set. Its chaos then has little to start from: with AVX-512 on two threads and SSE4 on
one, the losses differ by at most 4e-11 after 30 iterations (in float32 by 80 %).
"""

import json

import numpy as np
import pytest
import torch
from conftest import GOLDEN
from detectron2.data import build_detection_train_loader
from detectron2.data.samplers import TrainingSampler
from detectron2.utils.env import seed_all_rng
from freeanchor import data
from freeanchor.engine import Trainer

CURVE = GOLDEN / "quick_losses.json"
TOLERANCE = 1e-8


@torch.no_grad()
def draw_weights(model):
    """He's initialisation of the convolutions, and that of RetinaNet for the head."""
    rng = np.random.default_rng(0)
    for name, weight in model.named_parameters():
        if weight.dim() == 4:
            fan_out = weight.shape[0] * weight.shape[2] * weight.shape[3]
            std = 0.01 if name.startswith("head") else (2 / fan_out) ** 0.5
            weight.copy_(torch.from_numpy(rng.normal(0, std, weight.shape)))


def test_losses_of_the_quick_config(cfg, tmp_path, storage):
    """30 iterations on the embedded set."""
    data.write_shapes(tmp_path, num_train=80, num_val=1, seed=0)
    data.register_datasets([("shapes", str(tmp_path / "train.json"), str(tmp_path / "images"))])
    cfg.merge_from_list(
        [
            *("DATASETS.TRAIN", ("shapes",), "DATASETS.TEST", (), "OUTPUT_DIR", str(tmp_path)),
            *("MODEL.RETINANET.NUM_CLASSES", 4, "INPUT.MIN_SIZE_TRAIN", (96,)),
            *("SOLVER.MAX_ITER", 30, "DATALOADER.NUM_WORKERS", 0),
        ]
    )
    seed_all_rng(cfg.SEED)
    trainer = Trainer(cfg)
    # Detectron2's, so that the curve is one of the model and the step alone.
    records = data.load_training_set(cfg.DATASETS.TRAIN, filter_empty=True)
    trainer.data_loader = build_detection_train_loader(
        cfg,
        mapper=data.Mapper(cfg, is_train=True),
        dataset=records,
        sampler=TrainingSampler(len(records)),
    )
    trainer.model.double()
    draw_weights(trainer.model)
    trainer.train()
    expected = json.loads(CURVE.read_text())
    for name, values in expected.items():
        found = [value for value, _ in trainer.storage.history(name).values()]
        assert found == pytest.approx(values, rel=TOLERANCE), name
