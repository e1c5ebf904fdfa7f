#!/usr/bin/env python
"""What test_processes.py looks at, from one, two and three processes: prints JSON.

A program of its own, because PyTorch's threads do not survive a fork, which makes processes cheap.
"""

import json
import os
import pickle
import sys
import tempfile
from functools import partial
from pathlib import Path

import freeanchor  # isort: skip  # makes Detectron2 importable
import torch
from conftest import instances, quick_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import create_ddp_model
from detectron2.engine.hooks import EvalHook
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from freeanchor import data
from freeanchor.checkpoint import write_checkpoint
from freeanchor.engine import Trainer
from freeanchor.engine.optimizer import build_optimizer
from freeanchor.engine.processes import join_others
from freeanchor.engine.step import TrainStep, without_ddp
from freeanchor.errors import FreeAnchorError
from tiny_run import TINY_MODEL

# Objects in each image of a batch: its processes get every second or third.
FEW_AND_MANY = (1, 10, 1, 10)
WITH_EMPTY = (2, 0, 5, 0, 0, 0)  # in two processes and in three, one has no objects at all
NO_OBJECTS = (0, 0, 0, 0, 0, 0)
# No two objects of a class in an image: their bags share no pair of anchor and class.
APART = (2, 0, 3, 0, 0, 0)


def fork(function, count, *arguments):
    """Run a function in `count` processes that are a group, and give all results."""
    port = 20000 + os.getpid() % 20000 + count
    with tempfile.TemporaryDirectory() as folder:
        pids = []
        for rank in range(count):
            pid = os.fork()
            if not pid:
                try:
                    torch.set_num_threads(1)
                    if count > 1:
                        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
                        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
                        os.environ["WORLD_SIZE"] = str(count)
                        join_others(timeout_minutes=1)
                    with EventStorage():
                        result = function(*arguments)
                    (Path(folder) / str(rank)).write_bytes(pickle.dumps(result))
                    comm.synchronize()
                    os._exit(0)
                except BaseException:
                    import traceback

                    traceback.print_exc()
                finally:
                    os._exit(1)
            pids.append(pid)
        statuses = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        assert not any(statuses), statuses
        return [pickle.loads((Path(folder) / str(rank)).read_bytes()) for rank in range(count)]


def gradients(
    counts, normalizer, norm="", steps=1, part=(0, 1), config="free_anchor", without=None
):
    """The gradient of a batch, in this group of processes, in float64.

    Args:
        counts: objects in each image.
        normalizer: `MODEL.FREEANCHOR.NORMALIZER`.
        norm: of all layers.
        steps: `SOLVER.ACCUMULATION_STEPS`, of the images that as many processes would have.
        part: (first, step): this process's images, as a slice, where it is alone.
        config: the beginning of a quick config's name.
        without: the name of a loss that is left out.
    """
    cfg = quick_cfg(f"quick/{config}_R_18_FPN.yaml")
    cfg.merge_from_list(TINY_MODEL)
    cfg.MODEL.FREEANCHOR.NORMALIZER, cfg.SOLVER.ACCUMULATION_STEPS = normalizer, steps
    for node in (cfg.MODEL.RESNETS, cfg.MODEL.FPN, cfg.MODEL.RETINANET):
        node.NORM = norm
    torch.manual_seed(0)
    model = build_model(cfg).double()
    if without is not None:
        model.register_forward_hook(
            lambda _, inputs, losses: {k: v for k, v in losses.items() if k != without}
        )
    generator = torch.Generator().manual_seed(1)
    batch = []
    for count in counts:
        corner = torch.rand(count, 2, generator=generator) * 40
        boxes = torch.cat([corner, corner + 8 + torch.rand(count, 2, generator=generator) * 16], 1)
        classes = torch.arange(count) % 3
        image = torch.randint(256, (3, 64, 64), generator=generator)
        batch.append({"image": image, "instances": instances(boxes, classes)})
    if comm.get_world_size() > 1:
        part = comm.get_rank(), comm.get_world_size()
    ddp_model = create_ddp_model(model, broadcast_buffers=False, device_ids=None)
    step = TrainStep(cfg, ddp_model, [], build_optimizer(cfg, model))
    batch = batch[part[0] :: part[1]]
    step.forward_backward([x for i in range(steps) for x in batch[i::steps]])
    return {name: x.grad for name, x in without_ddp(model).named_parameters()}


def largest_difference(ours, theirs):
    """Of all elements, over the largest element of each tensor (or 1e-9, for a bias before BN)."""
    assert ours.keys() == theirs.keys()
    return max(
        float((x - theirs[name]).abs().max() / theirs[name].abs().max().clamp(min=1e-9))
        for name, x in ours.items()
    )


class Oracle(torch.nn.Module):
    """Detects every second object, and some things that are none."""

    def __init__(self, name):
        super().__init__()
        self.annotations = {x["image_id"]: x["annotations"] for x in DatasetCatalog.get(name)}

    def forward(self, batch):
        outputs = []
        for image in batch:
            objects = self.annotations[image["image_id"]]
            boxes = torch.tensor([x["bbox"] for x in objects])
            boxes[:, 2:] += boxes[:, :2]
            boxes[1::2] -= 9
            result = Instances((image["height"], image["width"]))
            result.pred_boxes = Boxes(boxes)
            result.scores = torch.linspace(0.9, 0.3, len(boxes)) - 0.01 * image["image_id"]
            result.pred_classes = torch.tensor([x["category_id"] for x in objects])
            outputs.append({"instances": result})
        return outputs


def evaluation(triple):
    """AP of known detections on a data set."""
    data.register_datasets([triple])
    cfg = quick_cfg()
    cfg.DATASETS.TEST, cfg.OUTPUT_DIR = (triple[0],), str(Path(triple[1]).parent / "output")
    cfg.DATALOADER.NUM_WORKERS = 0
    results = Trainer.test(cfg, Oracle(triple[0]))
    # What is not a number there is equal too.
    return {task: {k: repr(v) for k, v in x.items()} for task, x in results.items()}


def trainer_of(triple, name=""):
    """A trainer of a tiny model, with a folder for each process."""
    data.register_datasets([triple])
    cfg = quick_cfg()
    cfg.merge_from_list(TINY_MODEL)
    folder = Path(triple[1]).parent / f"of {comm.get_rank()}"
    folder.mkdir(exist_ok=True)
    cfg.MODEL.RETINANET.NUM_CLASSES = 0  # those of the data
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = (triple[0],), ()
    cfg.OUTPUT_DIR, cfg.MODEL.WEIGHTS = str(folder), name
    cfg.DATALOADER.NUM_WORKERS = 0
    return Trainer(cfg), folder


def evaluated_statistics(triple):
    """A running mean of the model that this process evaluates in a training."""
    trainer, _ = trainer_of(triple)
    (hook,) = (x for x in trainer._hooks if isinstance(x, EvalHook))
    statistics = without_ddp(trainer.model).backbone.fpn_lateral3.norm.running_mean
    statistics.fill_(comm.get_rank())
    trainer.test = lambda _, model: statistics.mean().item()
    return hook._func()


def loaded(triple, names, resume=False):
    """What is said when processes load from different folders, and where the training starts."""
    trainer, folder = trainer_of(triple)
    if names[comm.get_rank()]:
        state = without_ddp(trainer.model).state_dict()
        bias = {"head.cls_score.bias": state["head.cls_score.bias"] + comm.get_rank()}
        write_checkpoint(folder / names[comm.get_rank()], {**state, **bias}, {})
    if not resume:
        trainer, _ = trainer_of(triple, str(folder / names[comm.get_rank()]))
    try:
        trainer.resume_or_load(resume)
    except FreeAnchorError as e:
        return str(e)
    return trainer.start_iter


def ordered_otherwise(triple):
    """What is said of a data set that the second process has in another order."""
    data.register_datasets([triple])
    records = DatasetCatalog.get(triple[0])
    DatasetCatalog.register("ordered", lambda: records[:: -1 if comm.get_rank() else 1])
    MetadataCatalog.get("ordered").thing_classes = MetadataCatalog.get(triple[0]).thing_classes
    cfg = quick_cfg()
    cfg.merge_from_list(TINY_MODEL)
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = ("ordered",)
    cfg.OUTPUT_DIR, cfg.MODEL.RETINANET.NUM_CLASSES = str(Path(triple[1]).parent / "output"), 0
    said = []
    for work in (Trainer, lambda cfg: Trainer.test(cfg, Oracle("ordered"))):
        try:
            work(cfg)
        except FreeAnchorError as e:
            said.append(str(e))
    return said


def compare_ltm(config):
    """The gradient of LTM in two processes against that of one, see docs/methods.md."""

    def compare(counts, one, **arguments):
        found = fork(partial(gradients, config=config, **arguments), 2, counts, "global")
        return max(largest_difference(x, one) for x in found)

    def alone(counts, **arguments):
        return fork(partial(gradients, config=config, **arguments), 1, counts, "global")[0]

    in_bags = {"without": "loss_background"}
    return {
        "apart": compare(APART, alone(APART)),
        "no objects": compare(NO_OBJECTS, alone(NO_OBJECTS)),
        "shared": compare(FEW_AND_MANY, alone(FEW_AND_MANY)),
        "shared, in bags": compare(FEW_AND_MANY, alone(FEW_AND_MANY, **in_bags), **in_bags),
        "shared, in parts": compare(FEW_AND_MANY, alone(FEW_AND_MANY, steps=2)),
    }


def main(folder):
    torch.set_num_threads(1)
    results = {}
    whole = {x: fork(gradients, 1, x, "global")[0] for x in (FEW_AND_MANY, WITH_EMPTY, NO_OBJECTS)}
    cases = {"few and many": FEW_AND_MANY, "with empty": WITH_EMPTY, "no objects": NO_OBJECTS}
    for processes in (2, 3):
        for name, counts in cases.items():
            if len(counts) % processes == 0 and (processes == 2 or any(counts)):
                found = fork(gradients, processes, counts, "global")
                results[f"global, {name}, {processes} processes"] = max(
                    largest_difference(x, whole[counts]) for x in found
                )
    synchronised = fork(gradients, 1, WITH_EMPTY, "global", "BN")[0]
    found = fork(gradients, 2, WITH_EMPTY, "global", "naiveSyncBN")
    results["global, batch norm"] = max(largest_difference(x, synchronised) for x in found)
    halves = [fork(gradients, 1, FEW_AND_MANY, "local", "", 1, (i, 2))[0] for i in (0, 1)]
    mean = {name: (x + halves[1][name]) / 2 for name, x in halves[0].items()}
    found = fork(gradients, 2, FEW_AND_MANY, "local")
    results["local"] = max(largest_difference(x, mean) for x in found)
    results["local and global"] = largest_difference(mean, whole[FEW_AND_MANY])
    for processes in (1, 2):
        found = fork(gradients, processes, FEW_AND_MANY, "global", "", 2)
        results[f"accumulated, {processes} processes"] = max(
            largest_difference(x, whole[FEW_AND_MANY]) for x in found
        )
    for config in ("ltm", "ltm_af"):
        results |= {f"{config}, {name}": x for name, x in compare_ltm(config).items()}
    data.write_shapes(folder, num_train=1, num_val=5, seed=0)
    triple = ("shapes", str(folder / "val.json"), str(folder / "images"))
    results["evaluation"] = [fork(evaluation, count, triple)[0] for count in (1, 2, 3)]
    results["statistics"] = fork(evaluated_statistics, 2, triple)
    results["weights"] = fork(loaded, 2, triple, ("a.pth", "b.pth"))
    # Newest on the second process alone: it starts anew like the first.
    results["resumed"] = fork(loaded, 2, triple, ("", "model_final.pth"), True)
    results["ordered"] = fork(ordered_otherwise, 2, triple)
    print(json.dumps(results))


if __name__ == "__main__":
    assert freeanchor
    sys.path.insert(0, str(Path(__file__).parents[1]))
    main(Path(sys.argv[1]))
