"""COCO-Detection/free_anchor_R_50_FPN_1x.yaml as a LazyConfig, see docs/lazyconfig.md."""

import freeanchor  # isort: skip  # before Detectron2: makes 0.6 work with today's packages
from detectron2 import model_zoo
from detectron2.config import LazyCall
from freeanchor.evaluation import BoxEvaluator

_base = model_zoo.get_config("COCO-Detection/retinanet_R_50_FPN_1x.py")
dataloader, lr_multiplier, model, optimizer, train = (
    _base[key] for key in ("dataloader", "lr_multiplier", "model", "optimizer", "train")
)

model._target_ = f"{freeanchor.FreeAnchor.__module__}.{freeanchor.FreeAnchor.__name__}"
model.anchor_matcher = None  # objects choose their anchors
model.box2box_transform.weights = [10.0, 10.0, 5.0, 5.0]
model.head.prior_prob = 0.02
model.focal_loss_alpha = 0.5
model.smooth_l1_beta = 0.11
model.normalizer = "local"  # as the published results were obtained

dataloader.train.mapper.augmentations[0].short_edge_length = (800,)
dataloader.evaluator = LazyCall(BoxEvaluator)(dataset_name="${..test.dataset.names}")

optimizer.params.base_lr = "${..lr}"
optimizer.params.bias_lr_factor = 2.0
optimizer.params.weight_decay_bias = 0.0
lr_multiplier.warmup_length = 500 / 90000
lr_multiplier.warmup_factor = 1 / 3
