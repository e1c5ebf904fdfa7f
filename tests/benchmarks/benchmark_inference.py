"""Time and memory of inference: FreeAnchor's against Detectron2's and torchvision's RetinaNet.

    python tests/benchmarks/benchmark_inference.py [--runs 7] [--threads 2] [--size 800 1216]
        [--image 480 640]

1. From the outputs of the head to detections, with 80 classes, for logits as a trained model has
   them, noisy ones (a third above the threshold) and saturated ones (all above). Detectron2's code
   has the same settings, and the detections are compared.
2. A whole image with an R-50, random weights, from pixels to detections.

Prints Markdown: each time and memory beside what it is compared with, and the goal.
"""

import argparse
import copy

import freeanchor  # noqa: F401  # isort: skip  # makes Detectron2 importable
import torch
from benchmark_losses import Row, make_cfg, peak_memory
from detectron2.modeling import RetinaNet, build_model
from detectron2.structures import ImageList
from freeanchor.engine.benchmark import alternate
from freeanchor.modeling import detect, optimize_inference
from torchvision.models.detection import retinanet_resnet50_fpn

GOALS = {"trained": ">= 2", "noisy": ">= 3.5", "saturated": ">= 5"}


def head_outputs(size, scores, num_classes=80):
    """Features and raw predictions of an image."""
    torch.manual_seed(0)
    features, logits, deltas = [], [], []
    for stride in (8, 16, 32, 64, 128):
        h, w = (-(-x // stride) for x in size)
        noise = torch.randn(1, 9 * num_classes, h, w)
        if scores == "trained":  # one logit in 2000 is above the threshold
            noise = torch.where(noise > 3.3, noise, noise - 8)
        elif scores == "noisy":
            noise = 2.5 * noise - 4
        else:
            noise = noise.abs() * 3
        features.append(torch.zeros(1, 1, h, w))
        logits.append(noise)
        deltas.append(0.5 * torch.randn(1, 36, h, w))
    return features, [logits, deltas]


def measure_detections(model, size, runs):
    """Rows of the first part."""
    rows = []
    for scores, goal in GOALS.items():
        features, predictions = head_outputs(size, scores)
        images = ImageList(torch.zeros(1, 3, *size), [size])

        def ours(features=features, predictions=predictions):
            return detect(model, features, predictions, [size])

        def theirs(features=features, predictions=predictions, images=images):
            return RetinaNet.forward_inference(model, images, features, predictions)

        (a,), (b,) = ours(), theirs()
        torch.testing.assert_close(a.scores, b.scores)
        our_time, their_time = alternate(runs, "cpu", ours, theirs)
        work = f"detections, {scores} scores"
        rows.append((Row(f"{work}: speed-up", "ms", their_time, our_time), goal))
        memory = peak_memory(ours, "cpu"), peak_memory(theirs, "cpu")
        rows.append((Row(f"{work}: peak extra memory", "MiB", *memory), "<= 1"))
    return rows


def measure_images(size, runs):
    """Rows of the second part."""
    ours, theirs = (build_model(make_cfg(x, "cpu")).eval() for x in ("FreeAnchor", "RetinaNet"))
    vision = retinanet_resnet50_fpn(
        weights=None, weights_backbone=None, num_classes=80, min_size=min(size), max_size=max(size)
    ).eval()
    float32, nhwc, bfloat16 = (copy.deepcopy(ours) for _ in range(3))
    optimize_inference(float32)
    optimize_inference(nhwc, channels_last=True)
    optimize_inference(bfloat16, torch.bfloat16, channels_last=True)
    pixels = torch.randint(0, 256, (3, *size), dtype=torch.uint8)
    works = {
        "float32": lambda: float32([{"image": pixels}]),
        "float32, channels-last": lambda: nhwc([{"image": pixels}]),
        "bfloat16": lambda: bfloat16([{"image": pixels}]),
        "Detectron2": lambda: theirs([{"image": pixels}]),
        "torchvision": lambda: vision([pixels / 255]),
    }
    times = dict(zip(works, alternate(runs, "cpu", *works.values())))
    memory = {name: peak_memory(work, "cpu") for name, work in works.items()}
    rows = []
    for other in ("Detectron2", "torchvision"):
        for name in list(works)[:3]:
            goal = "<= 0.45" if name == "bfloat16" else "<= 0.9"
            work = f"image of {size[0]} x {size[1]}, {name} over {other}"
            rows.append((Row(f"{work}: time", "ms", times[name], times[other]), goal))
            rows.append(
                (Row(f"{work}: peak extra memory", "MiB", memory[name], memory[other]), "<= 1")
            )
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--size", type=int, nargs=2, default=(800, 1216))
    parser.add_argument("--image", type=int, nargs=2, default=(480, 640))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with torch.no_grad():
        model = build_model(make_cfg("FreeAnchor", "cpu")).eval()
        rows = measure_detections(model, tuple(args.size), args.runs)
        rows += measure_images(tuple(args.image), args.runs)
    print(f"PyTorch {torch.__version__}, {args.threads} threads, {args.runs} runs\n")
    print("| work | goal | measured | met |\n|---|---|---|---|")
    for row, goal in rows:
        print(f"| {row.work} | {goal} | {row.cell()} | {'yes' if row.meets(goal) else 'no'} |")


if __name__ == "__main__":
    main()
