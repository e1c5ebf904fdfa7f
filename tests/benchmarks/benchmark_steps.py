"""Time of whole training steps on a CPU: mixed precision against float32, and a busy machine.

    python tests/benchmarks/benchmark_steps.py [--runs 15] [--only precision|busy]

prints a table in Markdown. A step is forward, backward and update, with random images and objects.

    precision   `SOLVER.AMP.ENABLED True` and False: medians of alternating steps in one process.
                The convolution is the most that one can hope for of the CPU.
    busy        how OpenMP's threads wait for each other, as `import freeanchor` sets it against
                GNU's default (PyTorch imported before): medians of alternating steps, of a process
                each, with nothing else running, beside as many busy loops as there are cores, and
                beside loops that stay on a core each.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from typing import NamedTuple

if "--torch-first" in sys.argv:
    import torch  # then it is too late for freeanchor to say how threads wait

import freeanchor  # noqa: F401  # isort: skip  # makes Detectron2 importable
import torch
from benchmark_losses import Row, describe_machine, make_instances
from detectron2.utils.events import EventStorage
from freeanchor import model_zoo
from freeanchor.engine import Trainer
from freeanchor.engine.benchmark import alternate
from freeanchor.engine.step import TrainStep

GOALS = {
    "quick config, 4 x 256 px, 2 threads: speed-up by mixed precision": ">= 2.2",
    "R-50, 2 x 320 px, 1 thread: speed-up by mixed precision": ">= 2.7",
    "quick config, 2 threads, quiet: time over GNU's default": "<= 1.05",
    "quick config, 2 threads, busy over quiet: time": "<= 3",
}


class Setting(NamedTuple):
    """A config, and the batch that it is measured with."""

    title: str
    config: str
    images: int
    size: int
    classes: int
    threads: int


QUICK = Setting(
    "quick config, 4 x 256 px, 2 threads", "quick/free_anchor_R_18_FPN.yaml", 4, 256, 3, 2
)
R50 = Setting(
    "R-50, 2 x 320 px, 1 thread", "COCO-Detection/free_anchor_R_50_FPN_1x.yaml", 2, 320, 80, 1
)
LITE0 = Setting(
    "fine-tuning, 4 x 320 px, 2 threads", "finetune/free_anchor_Lite0_FPN.yaml", 4, 320, 7, 2
)


def build_step(setting, mixed):
    """A training step on one batch, always the same."""
    torch.manual_seed(0)
    cfg = model_zoo.get_config(setting.config)
    cfg.MODEL.WEIGHTS, cfg.MODEL.DEVICE = "", "cpu"
    cfg.MODEL.RETINANET.NUM_CLASSES = setting.classes
    cfg.SOLVER.AMP.ENABLED = mixed
    cfg.SOLVER.BASE_LR = 0.0  # random weights, which a step would blow up
    cfg.SOLVER.REFERENCE_WORLD_SIZE = 0
    model = Trainer.build_model(cfg)
    size = [setting.size] * 2
    objects = itertools.chain(*(make_instances(size, 9, setting.classes, "cpu") for _ in range(2)))
    batch = [
        {"image": torch.randint(256, (3, *size), dtype=torch.uint8), "instances": x}
        for x in itertools.islice(objects, setting.images)
    ]
    return TrainStep(cfg, model, itertools.repeat(batch), Trainer.build_optimizer(cfg, model))


def convolve(dtype):
    """Forward and backward of one large convolution in its best memory layout, on one thread."""
    layout = torch.channels_last if dtype == torch.bfloat16 else torch.contiguous_format
    shapes = (2, 256, 40, 40), (256, 256, 3, 3)
    x, weight = (torch.randn(s).to(dtype, memory_format=layout).requires_grad_() for s in shapes)

    def run():
        torch.nn.functional.conv2d(x, weight, padding=1).sum().backward()

    return run


def measure_precision(runs):
    for setting in (QUICK, R50, LITE0):
        torch.set_num_threads(setting.threads)
        steps = [build_step(setting, mixed).run_step for mixed in (False, True)]
        title = f"{setting.title}: speed-up by mixed precision"
        yield Row(title, "ms", *alternate(runs, "cpu", *steps))
        works = [convolve(dtype) for dtype in (torch.float32, torch.bfloat16)]
        title = f"a convolution alone, {setting.threads} threads: speed-up by bfloat16"
        yield Row(title, "ms", *alternate(runs, "cpu", *works))


def serve():
    """What a child does: for each line of its input, a step and its milliseconds."""
    torch.set_num_threads(QUICK.threads)
    step = build_step(QUICK, mixed=False)
    with EventStorage():
        for _ in sys.stdin:
            start = time.perf_counter()
            step.run_step()
            print(json.dumps((time.perf_counter() - start) * 1000), flush=True)


def start_child(*options):
    env = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", __file__, "--serve", *options],
        env={**env, "OMP_NUM_THREADS": str(QUICK.threads)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def ask(child):
    child.stdin.write("\n")
    child.stdin.flush()
    return float(child.stdout.readline())


def alternate_children(runs, children):
    times = [[ask(child) for child in children] for _ in range(runs + 1)][1:]
    return [statistics.median(x) for x in zip(*times)]


def measure_busy(runs):
    children = [start_child(), start_child("--torch-first")]
    loops = []
    try:
        ours, theirs = alternate_children(runs, children)
        yield Row("quick config, 2 threads, quiet: time over GNU's default", "ms", ours, theirs)
        cores = os.sched_getaffinity(0)
        loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in cores]
        busy, their_busy = alternate_children(max(3, runs // 3), children)
        yield Row("quick config, 2 threads, busy over quiet: time", "ms", busy, ours)
        title = "quick config, 2 threads, busy over quiet: time with GNU's default"
        yield Row(title, "ms", their_busy, theirs)
        for loop, core in zip(loops, cores):
            os.sched_setaffinity(loop.pid, [core])
        # Without GNU's default, whose steps take too long there to wait for.
        (busy,) = alternate_children(max(3, runs // 3), children[:1])
        title = "quick config, 2 threads, busy over quiet, each loop on its core: time"
        yield Row(title, "ms", busy, ours)
    finally:
        for process in (*children, *loops):
            process.kill()
            process.communicate()


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--only", choices=("precision", "busy"))
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--torch-first", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve()
        return
    args.threads = torch.get_num_threads()
    print(f"{describe_machine(args)}\n\n| work | goal | measured | met |\n|---|---|---|---|")
    parts = {"precision": measure_precision, "busy": measure_busy}
    with EventStorage():
        for name, part in parts.items():
            if args.only in (None, name):
                for row in part(args.runs):
                    goal = GOALS.get(row.work, "")
                    met = {True: "yes", False: "no"}[row.meets(goal)] if goal else ""
                    print(f"| {row.work} | {goal} | {row.cell()} | {met} |", flush=True)


if __name__ == "__main__":
    main()
