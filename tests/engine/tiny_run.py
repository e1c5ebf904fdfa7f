"""A training of a second or two, in processes of its own that may be killed."""

import json
import os
import runpy
import signal
import sys
import time
from pathlib import Path

import freeanchor  # noqa: F401  # isort: skip  # makes Detectron2 importable
import numpy as np
import torch
from freeanchor.checkpoint import read_checkpoint
from freeanchor.engine import launch  # noqa: F401  # what a child would import, once for all
from PIL import Image

REPOSITORY = Path(__file__).parents[2]
TRAIN_NET = REPOSITORY / "train_net.py"
NUM_IMAGES = 11  # no multiple of a batch
TINY_MODEL = [
    *("MODEL.RESNETS.DEPTH", "50", "MODEL.RESNETS.STEM_OUT_CHANNELS", "4"),
    *("MODEL.RESNETS.RES2_OUT_CHANNELS", "8", "MODEL.RESNETS.WIDTH_PER_GROUP", "4"),
    *("MODEL.FPN.OUT_CHANNELS", "8", "MODEL.RETINANET.NUM_CONVS", "1"),
]
OPTIONS = [
    *TINY_MODEL,
    *("INPUT.MIN_SIZE_TRAIN", "(48, 64)", "DATALOADER.ASPECT_RATIO_GROUPING", "True"),
    *("SOLVER.REFERENCE_WORLD_SIZE", "0", "SOLVER.IMS_PER_BATCH", "4"),
    *("SOLVER.WARMUP_ITERS", "5", "SOLVER.CHECKPOINT_PERIOD", "2"),
    *("DATASETS.TRAIN", "('tiny',)", "DATASETS.TEST", "()", "VIS_PERIOD", "0"),
]


def write_data(folder):
    """Noise in two aspect ratios, with a box in each image but one."""
    rng = np.random.default_rng(0)
    (folder / "images").mkdir(parents=True)
    images, annotations = [], []
    for i in range(1, NUM_IMAGES + 1):
        width, height = (64, 48) if i % 3 else (48, 64)
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{i}.png")
        images.append({"id": i, "file_name": f"{i}.png", "width": width, "height": height})
        box = [int(x) for x in rng.integers(4, 24, 4)]
        box = {"bbox": box, "area": box[2] * box[3], "iscrowd": 0, "category_id": 1}
        annotations.append({"id": i, "image_id": i, **box})
    content = {"images": images, "annotations": annotations}
    content["categories"] = [{"id": 1, "name": "noise"}]
    (folder / "train.json").write_text(json.dumps(content))


def command(data, output, *options):
    """The arguments of train_net.py."""
    config = REPOSITORY / "configs" / "quick" / "free_anchor_R_18_FPN.yaml"
    flags = [x for x in options if x.startswith("--")]
    values = [x for x in options if not x.startswith("--")]
    dataset = ["--dataset", "tiny", str(data / "train.json"), str(data / "images")]
    return [
        *("--config-file", str(config), *flags, *dataset),
        *OPTIONS,
        *("OUTPUT_DIR", str(output), *values),
    ]


class Run:
    """A training in one or several forked processes, as torchrun would start them.

    The parent has imported everything and must not have computed anything: OpenMP does not
    survive a fork.
    """

    def __init__(self, arguments, processes=1):
        self.output = Path(arguments[arguments.index("OUTPUT_DIR") + 1])
        self.output.mkdir(parents=True, exist_ok=True)
        port = 20000 + os.getpid() % 20000
        self.pids = [self._fork(arguments, rank, processes, port) for rank in range(processes)]

    def _fork(self, arguments, rank, processes, port):
        if pid := os.fork():
            return pid
        status = 1
        try:
            log = os.open(self.output / f"out_{rank}.txt", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            torch.set_num_threads(1)
            if processes > 1:
                os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
                os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes))
            sys.argv = ["train_net.py", *arguments]
            runpy.run_path(str(TRAIN_NET), run_name="__main__")
            status = 0
        except SystemExit as e:
            status = e.code if isinstance(e.code, int) else 1
            print(e.code, flush=True)
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(status)

    def kill(self, number=signal.SIGKILL, rank=0):
        os.kill(self.pids[rank], number)

    def wait(self, timeout=120):
        """Exit statuses, by rank: negative for a signal."""
        deadline = time.monotonic() + timeout
        statuses = [None] * len(self.pids)
        while None in statuses:
            for i, pid in enumerate(self.pids):
                if statuses[i] is None:
                    done, status = os.waitpid(pid, os.WNOHANG)
                    if done:
                        statuses[i] = os.waitstatus_to_exitcode(status)
            if time.monotonic() > deadline:
                for pid, status in zip(self.pids, statuses):
                    if status is None:
                        os.kill(pid, signal.SIGKILL)
                raise TimeoutError(f"{self.output}: {statuses}")
            time.sleep(0.01)
        return statuses


def result(output):
    """The tensors of the last checkpoint of a run: weights, optimiser and random numbers."""
    content = read_checkpoint(str(output / "model_final.pth"))
    optimizer = content["trainer"]["optimizer"]["state"]
    return {
        **content["model"],
        **{f"{name} {i}": x for i, state in optimizer.items() for name, x in state.items()},
        **{f"random {i}": x["torch"] for i, x in enumerate(content["random_states"])},
    }


def difference(one, other):
    """The names of the tensors that are not equal to the last bit."""
    assert one.keys() == other.keys()
    return [name for name, tensor in one.items() if not torch.equal(tensor, other[name])]
