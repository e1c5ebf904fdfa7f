"""Speed and memory of a config on this machine, beside Detectron2's RetinaNet of its backbone.

Both have random weights and the same random images and objects, in one process, and take turns,
so that what else the machine does meets both. Data loading is left out.
"""

import math
import multiprocessing
import platform
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from itertools import repeat
from pathlib import Path
from typing import Any, NamedTuple

import torch
from detectron2.config import CfgNode
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

from ..config import is_two_stage, parse_config
from ..errors import FreeAnchorError
from ..modeling.precision import choose_precision
from .precision import inference_autocast
from .step import TrainStep
from .trainer import Trainer

__all__ = ["Figures", "Setting", "alternate", "benchmark", "default_setting", "to_markdown"]

_OPPONENT = "RetinaNet"
_SIDES = 16.0, 400.0  # of objects, in pixels: most of COCO's
_ASPECT_RATIO = 4 / 3  # of images, as most of COCO's
_MIB = 2**20


class Setting(NamedTuple):
    """What is measured.

    Attributes:
        images: of a training step.
        size: height and width of all images.
        objects: in each image; COCO has 7.
        runs: steps of each contestant that are timed, after some that are not.
    """

    images: int
    size: tuple[int, int]
    objects: int = 7
    runs: int = 5


class Figures(NamedTuple):
    """Of a contestant: images per second, and the peak memory of training in MiB."""

    training: float
    inference: float
    memory: float


def default_setting(cfg: CfgNode) -> Setting:
    """The batch of one process and the size of images that a config trains with."""
    images = cfg.SOLVER.IMS_PER_BATCH // max(1, cfg.SOLVER.REFERENCE_WORLD_SIZE)
    short = cfg.INPUT.MIN_SIZE_TRAIN[-1]
    return Setting(images, (short, min(cfg.INPUT.MAX_SIZE_TRAIN, round(short * _ASPECT_RATIO))))


def benchmark(cfg: CfgNode, setting: Setting) -> dict[str, Figures]:
    """Measure a config and Detectron2's RetinaNet, which differs in the meta-architecture alone.

    Memory on a GPU is what PyTorch has allocated at most; on a CPU, the largest resident memory of
    a process of its own, Python and libraries included; not a number where the system is not Linux.

    Args:
        cfg: the config. Its weights are not read, and its learning rate is not used.
        setting: what is measured.

    Returns:
        The figures by the name of the meta-architecture: medians of alternating steps.

    Raises:
        FreeAnchorError: the config is RetinaNet's own or of two stages, or a number is not
            positive.
    """
    name = cfg.MODEL.META_ARCHITECTURE
    if name == _OPPONENT:
        raise FreeAnchorError(f"the config is {_OPPONENT}'s: give one of FreeAnchor")
    if is_two_stage(cfg):
        raise FreeAnchorError(f"the config has two stages: give one that {_OPPONENT} can have")
    if min(setting.images, *setting.size, setting.runs) < 1 or setting.objects < 0:
        raise FreeAnchorError("images, size and runs must be at least 1, and objects at least 0")
    names = (name, _OPPONENT)
    cfgs = {x: _contestant(cfg, x) for x in names}
    device = torch.device(cfg.MODEL.DEVICE).type
    measure = _peak_on_gpu if device == "cuda" else _peak_of_child
    memory = {x: measure(cfgs[x], setting) for x in names}
    steps = {x: _training_step(cfgs[x], setting) for x in names}
    with EventStorage():
        training = alternate(setting.runs, device, *(x.run_step for x in steps.values()))
    detect = [_inference(cfgs[x], steps[x].model, setting) for x in names]
    inference = alternate(setting.runs, device, *detect)
    return {
        x: Figures(1000 * setting.images / step, 1000 / image, memory[x] / _MIB)
        for x, step, image in zip(names, training, inference)
    }


def to_markdown(cfg: CfgNode, setting: Setting, figures: dict[str, Figures]) -> str:
    """What was measured, on which machine, and a table."""
    height, width = setting.size
    lines = [
        f"{_machine(cfg)}. Random weights; training with {setting.images} and inference with 1 "
        f"image of {height} x {width}, {setting.objects} objects in each, without data loading; "
        f"medians of {setting.runs} alternating runs",
        "",
        f"| | {' | '.join(figures)} | ratio |",
        "|---|---|---|---|",
    ]
    ours, theirs = figures.values()
    for label, a, b in zip(
        ("training, images/s", "inference, images/s", "training, peak memory in MiB"), ours, theirs
    ):
        lines.append(f"| {label} | {a:.4g} | {b:.4g} | {a / b:.2f} |")
    return "\n".join(lines)


def _machine(cfg: CfgNode) -> str:
    device = torch.device(cfg.MODEL.DEVICE)
    precision = str(choose_precision(cfg, cfg.SOLVER.AMP.ENABLED).dtype).removeprefix("torch.")
    if device.type == "cuda":
        where = torch.cuda.get_device_name(device)
    else:
        where = f"CPU ({_cpu_name()}), {torch.get_num_threads()} threads"
    return f"{where}, PyTorch {torch.__version__}, training in {precision}"


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as f:
            names = [x.partition(":")[2].strip() for x in f if x.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def _contestant(cfg: CfgNode, name: str) -> CfgNode:
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.WEIGHTS = name, ""
    cfg.SOLVER.BASE_LR = 0.0  # random weights would not stay finite for long
    cfg.SOLVER.REFERENCE_WORLD_SIZE, cfg.SOLVER.ACCUMULATION_STEPS = 0, 1
    return cfg


def _batch(cfg: CfgNode, setting: Setting) -> list[dict[str, Any]]:
    """Random images and objects, the same for all contestants."""
    generator = torch.Generator().manual_seed(0)
    height, width = setting.size
    limits = torch.tensor([width, height], dtype=torch.float32)
    shape = (len(cfg.MODEL.PIXEL_MEAN), height, width)
    low, high = (math.log(x) for x in _SIDES)
    batch = []
    for _ in range(setting.images):
        sides = (low + (high - low) * torch.rand(setting.objects, 2, generator=generator)).exp()
        sides = torch.minimum(sides, limits)
        start = (limits - sides) * torch.rand(setting.objects, 2, generator=generator)
        objects = Instances((height, width))
        objects.gt_boxes = Boxes(torch.cat([start, start + sides], dim=1))
        objects.gt_classes = torch.randint(
            cfg.MODEL.RETINANET.NUM_CLASSES, (setting.objects,), generator=generator
        )
        pixels = torch.randint(256, shape, dtype=torch.uint8, generator=generator)
        batch.append({"image": pixels, "height": height, "width": width, "instances": objects})
    return batch


def _training_step(cfg: CfgNode, setting: Setting) -> TrainStep:
    torch.manual_seed(0)
    model = Trainer.build_model(cfg).train()
    optimizer = Trainer.build_optimizer(cfg, model)
    return TrainStep(cfg, model, repeat(_batch(cfg, setting)), optimizer)


def _inference(cfg: CfgNode, model: Any, setting: Setting) -> Callable[[], Any]:
    """Detect in one image, as `train_net.py --eval-only` does."""
    image = {k: v for k, v in _batch(cfg, setting)[0].items() if k != "instances"}
    model.eval()

    def detect() -> None:
        with torch.inference_mode(), inference_autocast(cfg, model):
            model([image])

    return detect


def alternate(runs: int, device: str, *works: Callable[[], Any]) -> list[float]:
    """Median milliseconds of works on a type of device that take turns, after some that warm up."""
    times: list[list[float]] = [[] for _ in works]
    for run in range(-3 if device == "cuda" else -1, runs):  # the negative ones warm up
        for work, measured in zip(works, times):
            duration = _milliseconds(work, device)
            if run >= 0:
                measured.append(duration)
    return [statistics.median(x) for x in times]


def _milliseconds(work: Callable[[], Any], device: str) -> float:
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        work()
        end.record()
        end.synchronize()
        duration: float = start.elapsed_time(end)
        return duration
    begin = time.perf_counter()
    work()
    return (time.perf_counter() - begin) * 1000


def _peak_on_gpu(cfg: CfgNode, setting: Setting) -> float:
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step = _training_step(cfg, setting)
    with EventStorage():
        for _ in range(2):  # momentum is there from the second one
            step.run_step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _peak_of_child(cfg: CfgNode, setting: Setting) -> float:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_peak_on_cpu, cfg.dump(), setting, torch.get_num_threads()).result()


def _peak_on_cpu(text: str, setting: Setting, threads: int) -> float:
    """What a child does: two steps; then its largest resident memory, in bytes."""
    torch.set_num_threads(threads)
    cfg = parse_config(text)
    step = _training_step(cfg, setting)
    with EventStorage():
        for _ in range(2):
            step.run_step()
    # Not getrusage, whose maximum may be that of the process which started this one.
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:  # not Linux
        return math.nan
    return float(status.split("VmHWM:")[1].split()[0]) * 1024
