"""Time and memory of the losses against what else computes them.

    python tests/benchmarks/benchmark_losses.py [--json FILE] [--mmdet]

prints a table in Markdown (on Linux only). Both numbers of a ratio come from one process, times as
medians of alternating runs, at COCO scale: two images of 800 x 1216, 9 anchors per location, 80
classes, float32. A loss starts at the raw outputs of the head and includes the backward pass to
them, and must agree with the other FreeAnchors in value and gradients before it is timed.
A process is started for each part and setting:

    loss        the extension, against others          default  the allocator as it is
    reference   without it, against others             kept     a heap that keeps freed memory
    training    whole steps, two images 800 x 1333     cuda     on the GPU, if there is one

By default, glibc gives large tensors back to the system, which fills new ones with zeros page by
page: much of the time of every contestant.

In seconds, to see that it runs: --objects 7 --runs 1 --size 160 224 --train-on-cpu
"""

import argparse
import ctypes
import gc
import itertools
import json
import os
import platform
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import NamedTuple

if "--part=reference" in sys.argv:
    sys.modules["freeanchor.layers._C"] = None  # for Python, such a module does not exist

import freeanchor  # isort: skip  # makes Detectron2 importable
import torch
from competitors import mmdetection_loss, straightforward_loss, torch_bags
from detectron2 import model_zoo
from detectron2.config import get_cfg
from detectron2.engine.train_loop import AMPTrainer, SimpleTrainer
from detectron2.modeling import build_model
from detectron2.modeling.backbone.resnet import BottleneckBlock
from detectron2.solver import build_optimizer
from detectron2.structures import Boxes, Instances, pairwise_iou
from detectron2.utils.events import EventStorage
from freeanchor.engine.benchmark import alternate
from freeanchor.layers import ops

FOLDER = Path(__file__).parents[2] / "configs"
CONFIGS = {
    "FreeAnchor": FOLDER / "COCO-Detection/free_anchor_R_50_FPN_1x.yaml",
    "LTM": FOLDER / "LTM/ltm_R_50_FPN_1x.yaml",
}
OBJECTS = [7, 30, 100]  # per image; COCO has 7
LOSS_SIZE, TRAINING_SIZE = [800, 1216], [800, 1333]  # a head sees images padded to 32
KEPT_HEAP = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}
MIB = 2**20

# By work: the goal, and that with a kept heap if there is one. They are for the default arguments.
GOALS = {
    "bags, 7 objects per image: speed-up over pairwise IoU + topk": [">= 150"],
    "bags, 30 objects per image: speed-up over pairwise IoU + topk": [">= 400"],
    "bags, 100 objects per image: speed-up over pairwise IoU + topk": [">= 600"],
    "bags, 7 objects per image: peak extra memory": ["<= 1"],
    "bags, 30 objects per image: peak extra memory": ["<= 1"],
    "bags, 100 objects per image: peak extra memory": ["<= 1"],
    "bags, 30 objects per image, exhaustive: the same speed-up": [">= 20"],
    "loss, 7 objects per image: speed-up over straightforward PyTorch": [">= 15", ">= 8"],
    "loss, 7 objects per image: speed-up over Detectron2 RetinaNet": [">= 18", ">= 8"],
    "loss, 7 objects per image: time over the floor, a clone()": ["<= 2.5"],
    "loss, 7 objects per image: peak extra memory over the gradients": ["<= 1.3"],
    "loss, 7 objects per image: LTM's over FreeAnchor's time": ["<= 1"],
    "loss, 1000 over 7 objects per image: time": ["<= 2"],
    "loss, 1000 over 7 objects per image: peak extra memory": ["<= 1.2"],
    "loss, 1203 over 80 classes, 300 objects per image: time per logit": ["<= 1.1"],
    "loss, 1203 classes, 300 objects per image: peak extra memory over the gradients": ["<= 1.3"],
    "PyTorch reference, 7 objects per image: speed-up over straightforward PyTorch": [">= 5"],
    "GPU: loss, 7 objects per image: time over the floor, a clone()": ["<= 2.5"],
    "GPU: R-50 training step, AMP off: time over Detectron2 RetinaNet": ["<= 0.97"],
    "GPU: R-50 training step, AMP off: peak memory over Detectron2 RetinaNet": ["<= 0.90"],
    "GPU: R-50 training step, AMP on: time over Detectron2 RetinaNet": ["<= 0.97"],
    "GPU: R-50 training step, AMP on: peak memory over Detectron2 RetinaNet": ["<= 0.90"],
}


class Row(NamedTuple):
    """A ratio, or one number."""

    work: str
    unit: str
    numerator: float
    denominator: float | None = None

    @property
    def value(self):
        return self.numerator / (self.denominator or 1)

    def cell(self):
        if self.denominator is None:
            return f"{show(self.numerator)} {self.unit}"
        ratio = f"{show(self.numerator)} / {show(self.denominator)}"
        return f"{show(self.value)}x ({ratio} {self.unit})"

    def meets(self, goal):
        comparison, bound = goal.split()
        return self.value >= float(bound) if comparison == ">=" else self.value <= float(bound)


def show(number):
    return f"{number:.3g}" if number < 100 else f"{number:.0f}"


class HeadOutputs:
    """What a head gives early in training: probabilities near 0.02, small deltas."""

    def __init__(self, size, num_classes, device, mean=-4):
        shapes = [[-(-length // stride) for length in size] for stride in (8, 16, 32, 64, 128)]
        self.features = [torch.empty(2, 1, *shape, device=device) for shape in shapes]

        def levels(depth, mean, std):
            make = (torch.randn(2, 9 * depth, *shape, device=device) for shape in shapes)
            return [x.mul_(std).add_(mean).requires_grad_() for x in make]

        self.predictions = [levels(num_classes, mean, std=0.5), levels(4, mean=0, std=0.3)]
        self.leaves = [*self.predictions[0], *self.predictions[1]]
        self.num_logits = sum(x.numel() for x in self.predictions[0])
        self.gradient_bytes = sum(x.numel() * x.element_size() for x in self.leaves)

    def train(self, loss, model, instances):
        """Forward, backward, and the gradients freed."""
        loss(model, self.features, self.predictions, instances).backward()
        for x in self.leaves:
            x.grad = None

    def clone(self):
        """The floor of a loss: read everything once, write as much once to new memory."""
        return [x.detach().clone() for x in self.leaves]


def make_instances(size, num_objects, num_classes, device):
    """Objects of two images, with sides of about 16 to 400 pixels, log-uniform as in COCO."""
    result = []
    for _ in range(2):
        bounds = torch.tensor([float(size[1]), float(size[0])])
        side = 16 * (400 / 16) ** torch.rand(num_objects, 1)
        aspect = 2 ** (torch.rand(num_objects, 1) - 0.5)
        extent = torch.minimum(torch.cat((side * aspect, side / aspect), dim=1), 0.9 * bounds)
        corner = torch.rand(num_objects, 2) * (bounds - extent)
        objects = Instances(tuple(size))
        objects.gt_boxes = Boxes(torch.cat((corner, corner + extent), dim=1))
        objects.gt_classes = torch.randint(num_classes, (num_objects,))
        result.append(objects.to(device))
    return result


def make_cfg(name, device, num_classes=80):
    if name in CONFIGS:
        cfg = get_cfg()
        freeanchor.add_freeanchor_config(cfg)
        cfg.merge_from_file(str(CONFIGS[name]))
    else:
        cfg = model_zoo.get_config("COCO-Detection/retinanet_R_50_FPN_1x.yaml")
    cfg.MODEL.DEVICE = device
    cfg.MODEL.RETINANET.NUM_CLASSES = num_classes
    return cfg


def detectron2_loss(model, features, predictions, instances):
    """Either model's own way from the outputs of its head to its losses."""
    return sum(model.forward_training(None, features, predictions, instances).values())


def peak_memory(work, device):
    """MiB that a work takes at most, beyond what is in use before it."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        start = torch.cuda.memory_allocated()
        work()
        return (torch.cuda.max_memory_allocated() - start) / MIB
    ctypes.CDLL(None).malloc_trim(0)  # what is free inside the heap would hide what is taken
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    start = resident("VmRSS")
    work()
    return resident("VmHWM") - start


def resident(key):
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{key}:")[1].split()[0]) / 1024


def check_same(model, size, losses):
    """Stop if losses that are to be compared do not compute the same, gradients included.

    Probabilities are near 0.5, where P{a in A+} weighs as much as the bags do. An object whose 50th
    and 51st IoU are equal is left out: `topk` picks any of its tied anchors.
    """
    device = model.device.type
    head = HeadOutputs(size, model.num_classes, device, mean=0)
    anchors = Boxes.cat(model.anchor_generator(head.features))
    k = model.pre_anchor_topk
    instances = []
    for objects in make_instances(size, 30, model.num_classes, device):
        top = pairwise_iou(objects.gt_boxes, anchors).topk(k + 1, dim=1).values
        instances.append(objects[top[:, k - 1] > 1.0001 * top[:, k]])
    expected = None
    for name, loss in losses.items():
        value = loss(model, head.features, head.predictions, instances)
        gradients = torch.autograd.grad(value, head.leaves)
        result = torch.cat([value.detach()[None], *[x.flatten() for x in gradients]])
        expected = result if expected is None else expected
        # Of each number by itself: few gradients depend on P{a in A+}.
        error = (result - expected).abs() / (expected.abs() + expected.abs().median())
        if not error[0] < 1e-5 or not error.max() < 1e-2:  # NaN neither
            sys.exit(f"{name} does not compute the same: errors {error[0]:.2g}, {error.max():.2g}")


def measure_loss(args, setting, device):
    """The extension against others."""
    size, few = args.size or LOSS_SIZE, args.objects[0]
    model = build_model(make_cfg("FreeAnchor", device))
    head = HeadOutputs(size, 80, device)
    instances = {n: make_instances(size, n, 80, device) for n in {*args.objects, 300, 1000}}
    yield from measure_bags(args, setting, device, model, head, instances)

    losses = {"FreeAnchor": detectron2_loss, "straightforward PyTorch": straightforward_loss}
    if args.mmdet:
        losses["MMDetection"] = mmdetection_loss(device)
    check_same(model, size, losses)
    works = {n: partial(head.train, loss, model, instances[few]) for n, loss in losses.items()}
    retinanet = build_model(make_cfg("RetinaNet", device))
    works["Detectron2 RetinaNet"] = partial(head.train, detectron2_loss, retinanet, instances[few])
    floor, *times = alternate(args.runs, device, head.clone, *works.values())
    times = dict(zip(works, times))
    ours, mine = works.pop("FreeAnchor"), times.pop("FreeAnchor")
    title = f"loss, {few} objects per image"
    for name, their in times.items():
        yield Row(f"{title}: speed-up over {name}", "ms", their, mine)
    yield Row(f"{title}: time over the floor, a clone()", "ms", mine, floor)

    ltm_model = build_model(make_cfg("LTM", device))
    ltm = partial(head.train, detectron2_loss, ltm_model, instances[few])
    title_of_ltm = f"{title}: LTM's over FreeAnchor's"
    yield Row(f"{title_of_ltm} time", "ms", *alternate(args.runs, device, ltm, ours))
    if setting != "kept":
        peaks = [peak_memory(work, device) for work in (ltm, ours)]
        yield Row(f"{title_of_ltm} peak extra memory", "MiB", *peaks)

    crowd = partial(head.train, detectron2_loss, model, instances[1000])
    growth = f"loss, 1000 over {few} objects per image"
    yield Row(f"{growth}: time", "ms", *alternate(args.runs, device, crowd, ours))
    if setting != "kept":
        gradients = head.gradient_bytes / MIB
        peak, crowd_peak = peak_memory(ours, device), peak_memory(crowd, device)
        yield Row(f"{title}: peak extra memory over the gradients", "MiB", peak, gradients)
        for name, work in works.items():
            row = f"{title}: peak extra memory of {name} over the gradients"
            yield Row(row, "MiB", peak_memory(work, device), gradients)
        yield Row(f"{growth}: peak extra memory", "MiB", crowd_peak, peak)

    lvis = HeadOutputs(size, 1203, device)
    lvis_model = build_model(make_cfg("FreeAnchor", device, 1203))
    lvis_instances = make_instances(size, 300, 1203, device)
    work = partial(lvis.train, detectron2_loss, lvis_model, lvis_instances)
    coco = partial(head.train, detectron2_loss, model, instances[300])
    times = alternate(args.runs, device, work, coco)
    per_logit = [1e6 * t / x.num_logits for t, x in zip(times, (lvis, head))]
    title = "loss, 1203 over 80 classes, 300 objects per image"
    yield Row(f"{title}: time per logit", "ns", *per_logit)
    if setting != "kept":
        title = "loss, 1203 classes, 300 objects per image: peak extra memory over the gradients"
        yield Row(title, "MiB", peak_memory(work, device), lvis.gradient_bytes / MIB)


def measure_bags(args, setting, device, model, head, instances):
    """The search for bags: anchors as grids, and as any others."""
    levels = model.anchor_generator(head.features)
    anchors, k = Boxes.cat(levels), model.pre_anchor_topk
    flat = [x.tensor for x in levels]
    grids = [x.view(*f.shape[-2:], -1, 4) for x, f in zip(flat, head.features)]
    for n in args.objects:
        gt_boxes = [x.gt_boxes for x in instances[n]]
        all_boxes = Boxes.cat(gt_boxes).tensor
        search = partial(ops.iou_topk, grids, all_boxes, k)
        exhaustive = partial(ops.iou_topk, flat, all_boxes, k)
        theirs = partial(torch_bags, anchors, gt_boxes, k)
        slow, fast, medium = alternate(args.runs, device, theirs, search, exhaustive)
        title = f"bags, {n} objects per image"
        yield Row(f"{title}: speed-up over pairwise IoU + topk", "ms", slow, fast)
        if setting != "kept":
            yield Row(f"{title}: peak extra memory", "MiB", peak_memory(search, device))
        yield Row(f"{title}, exhaustive: the same speed-up", "ms", slow, medium)


def measure_reference(args, setting, device):
    """The PyTorch reference, without the extension, against the straightforward loss."""
    size, few = args.size or LOSS_SIZE, args.objects[0]
    model = build_model(make_cfg("FreeAnchor", device))
    head = HeadOutputs(size, 80, device)
    instances = make_instances(size, few, 80, device)
    losses = {"reference": detectron2_loss, "straightforward PyTorch": straightforward_loss}
    check_same(model, size, losses)
    ours, theirs = (partial(head.train, loss, model, instances) for loss in losses.values())
    mine, their = alternate(args.runs, device, ours, theirs)
    title = f"PyTorch reference, {few} objects per image"
    yield Row(f"{title}: speed-up over straightforward PyTorch", "ms", their, mine)
    if setting != "kept":
        memory = peak_memory(ours, device), head.gradient_bytes / MIB
        yield Row(f"{title}: peak extra memory over the gradients", "MiB", *memory)


def measure_training(args, setting, device):
    """Detectron2's own training step on both models, R-50, two images."""
    size = args.size or TRAINING_SIZE
    batch = [
        {"image": torch.randint(256, (3, *size), dtype=torch.uint8), "instances": x}
        for x in make_instances(size, args.objects[0], 80, "cpu")
    ]
    names = "FreeAnchor", "RetinaNet"
    for amp in (False, True) if device == "cuda" else (False,):  # AMPTrainer is for CUDA only
        trainers = [], []
        start = (partial(start_training, *x, batch, device, amp) for x in zip(names, trainers))
        peaks = [peak_memory(work, device) for work in start]
        steps = (trainer.run_step for (trainer,) in trainers)
        times = alternate(args.runs, device, *steps)
        title = f"R-50 training step, AMP {'on' if amp else 'off'}"
        yield Row(f"{title}: time over Detectron2 RetinaNet", "ms", *times)
        yield Row(f"{title}: peak memory over Detectron2 RetinaNet", "MiB", *peaks)


def start_training(name, result, batch, device, amp):
    """Build a model and its trainer, run the first steps, and append the trainer to `result`."""
    torch.manual_seed(0)
    cfg = make_cfg(name, device)
    cfg.SOLVER.BASE_LR = 1e-5  # random weights
    model = build_model(cfg)
    for block in model.modules():
        if isinstance(block, BottleneckBlock):
            # Frozen batch norm does not normalize random weights: each block would double the
            # variance, and float16 overflow.
            block.conv3.norm.weight.fill_(0.2)
    trainer = (AMPTrainer if amp else SimpleTrainer)(
        model, itertools.repeat(batch), build_optimizer(cfg, model)
    )
    for _ in range(3):
        trainer.run_step()
    result.append(trainer)


def measure_part(args):
    """What a child process does: one part in one setting, as JSON."""
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    has_extension = torch._C._dispatch_has_kernel_for_dispatch_key("freeanchor::iou_topk", "CPU")
    if has_extension != (args.part != "reference"):
        sys.exit("The C++ operators of FreeAnchor must be built: see its README")
    part = {"loss": measure_loss, "reference": measure_reference, "training": measure_training}
    device = "cuda" if args.setting == "cuda" else "cpu"
    with EventStorage():  # Detectron2's models log to it
        rows = list(part[args.part](args, args.setting, device))
    print(json.dumps(rows))


def start_part(part, setting):
    print(f"measuring: {part}, {setting}", file=sys.stderr, flush=True)
    command = [sys.executable, "-W", "ignore", *sys.argv, f"--part={part}", f"--setting={setting}"]
    env = {**os.environ, **(KEPT_HEAP if setting == "kept" else {})}
    output = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True).stdout
    return [Row(*row) for row in json.loads(output.splitlines()[-1])]


def describe_machine(args):
    info = Path("/proc/cpuinfo").read_text()
    cpu = info.partition("model name\t: ")[2].partition("\n")[0] or platform.machine()
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{cpu} ({capability}), {args.threads} threads{gpu}, PyTorch {torch.__version__}"


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--objects", type=int, nargs="+", default=OBJECTS, help="per image")
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--size", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    parser.add_argument("--mmdet", action="store_true", help="compare with MMDetection 3.3 too")
    parser.add_argument("--train-on-cpu", action="store_true", help="a training step there too")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--setting", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        measure_part(args)
        return

    parts = [(part, heap) for heap in ("default", "kept") for part in ("loss", "reference")]
    parts += [("training", "cpu")] * args.train_on_cpu
    parts += [("loss", "cuda"), ("training", "cuda")] * torch.cuda.is_available()
    table = {}
    for part, setting in parts:
        for row in start_part(part, setting):
            work = {"cuda": "GPU: ", "cpu": "CPU: "}.get(setting, "") + row.work
            table.setdefault(work, []).append(row)
    machine = describe_machine(args)
    print(f"{machine}\n\n| work | goal | default allocator | kept heap | met |")
    print("|---|---|---|---|---|")
    # Times of fewer runs are chance, and the goals are for one scale.
    judged = args.size is None and args.objects == OBJECTS and args.runs >= 7 and args.threads == 1
    records = []
    for work, rows in table.items():
        goals = GOALS.get(work, []) if judged else []
        met = [row.meets(goal) for row, goal in zip(rows, goals)]
        default, kept, *_ = [row.cell() for row in rows] + [""]
        verdict = ("yes" if all(met) else "no") if met else ""
        print(f"| {work} | {', kept heap '.join(goals)} | {default} | {kept} | {verdict} |")
        figures = [{"value": row.value, **row._asdict()} for row in rows]  # default, kept heap
        records.append({"work": work, "goals": goals, "met": met, "figures": figures})
    if args.json:
        args.json.write_text(json.dumps({"machine": machine, "rows": records}, indent=1) + "\n")


if __name__ == "__main__":
    main()
