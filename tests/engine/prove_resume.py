#!/usr/bin/env python
r"""Proof that no run is lost: kills, signals and a soak, on a tiny model.

    tests/engine/prove_resume.py --kills 20 --soak 2000

A run is killed with SIGKILL at a random moment, resumed, and must end with the weights, momentum
and random numbers of an uninterrupted one, bit for bit; with 0 and 2 loader workers, and in two
processes, of which one is killed and the other has to leave by itself. A checkpoint is written
after every iteration, so that many kills come while one is being written.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from tiny_run import Run, command, difference, result, write_data


def run_to_end(arguments, processes):
    statuses = Run(arguments, processes).wait()
    assert statuses == [0] * processes, f"{arguments}: {statuses}"


def prove_kills(folder, data, kills, workers, processes, number, iterations):
    """Kill runs at random moments; how many ended like the uninterrupted one, and what was hit."""
    options = ["SOLVER.MAX_ITER", str(iterations), "DATALOADER.NUM_WORKERS", str(workers)]
    options += ["SOLVER.CHECKPOINT_PERIOD", "1"]
    start = time.monotonic()
    run_to_end(command(data, folder / "whole", *options), processes)
    duration = time.monotonic() - start
    expected = result(folder / "whole")
    counts = {"equal": 0, "in time": 0, "while writing": 0, "with a checkpoint": 0}
    for i in range(kills):
        output = folder / f"killed_{i}"
        arguments = command(data, output, *options)
        run = Run(arguments, processes)
        time.sleep(random.uniform(0.2, 1.0) * duration)
        with contextlib.suppress(ProcessLookupError):
            run.kill(number, rank=random.randrange(processes))
        statuses = run.wait()
        counts["in time"] += any(statuses)
        counts["while writing"] += any(output.glob("*.unfinished"))
        counts["with a checkpoint"] += (output / "last_checkpoint").exists()
        if number != signal.SIGKILL and any(statuses):
            # Before the first iteration and after the last, the system answers.
            files = {x.name for x in output.iterdir()}
            is_training = "last_checkpoint" in files and "model_final.pth" not in files
            assert set(statuses) == {128 + number} or not is_training, statuses
        run_to_end([*arguments[:2], "--resume", *arguments[2:]], processes)
        different = difference(expected, result(output))
        counts["equal"] += not different
        if different:
            print(f"{output} differs: {len(different)} tensors, such as {different[:3]}")
            continue
        assert not list(output.glob("*.unfinished"))
        shutil.rmtree(output)
    shutil.rmtree(folder / "whole")
    text = ", ".join(f"{count} {name}" for name, count in counts.items())
    print(
        f"{signal.Signals(number).name}, {workers} workers, {processes} processes: {text}, of "
        f"{kills}",
        flush=True,
    )
    return counts["equal"] == kills


def prove_silence(folder, data):
    """A process that hangs is noticed by the other one, which ends with a sentence."""
    arguments = command(data, folder / "silent", "--timeout=0.1", "SOLVER.MAX_ITER", "100000")
    run = Run(arguments, processes=2)
    while not (folder / "silent" / "last_checkpoint").exists():
        time.sleep(0.1)
    run.kill(signal.SIGSTOP, rank=1)
    status = os.waitstatus_to_exitcode(os.waitpid(run.pids[0], 0)[1])
    run.kill(signal.SIGKILL, rank=1)
    os.waitpid(run.pids[1], 0)
    said = (folder / "silent" / "out_0.txt").read_text().splitlines()[-1]
    print(f"a process that hangs: status {status}, {said}", flush=True)
    return status == 1 and "process 0 of 2 got no answer from another one" in said


def soak(folder, data, iterations):
    """A long run; its memory, descriptors and threads, as the kernel counts them."""
    options = ["SOLVER.MAX_ITER", str(iterations), "DATALOADER.NUM_WORKERS", "2"]
    options += ["SOLVER.CHECKPOINT_PERIOD", "100"]
    run = Run(command(data, folder / "soak", *options))
    samples = []
    process = Path("/proc") / str(run.pids[0])
    metrics = folder / "soak" / "metrics.json"
    while True:
        lines = metrics.read_text().splitlines() if metrics.exists() else []
        try:
            status = dict(x.split(":", 1) for x in (process / "status").read_text().splitlines())
            if status["State"].split()[0] == "Z":
                break
            descriptors = len(list((process / "fd").iterdir()))
        except (FileNotFoundError, ProcessLookupError, KeyError):
            break
        if lines:
            done = json.loads(lines[-1])["iteration"]
            rss = int(status["VmRSS"].split()[0]) / 1024
            samples.append((done, rss, descriptors, int(status["Threads"])))
        time.sleep(0.5)
    assert run.wait() == [0]
    samples = np.array([x for x in samples if x[0] >= iterations // 4])  # after the start
    slope = np.polyfit(samples[:, 0], samples[:, 1], 1)[0] * 1000
    print(
        f"soak, {iterations} iterations: memory {samples[0, 1]:.0f} MiB at iteration "
        f"{samples[0, 0]:.0f}, {samples[-1, 1]:.0f} MiB at {samples[-1, 0]:.0f}, slope "
        f"{slope:.2f} MiB per 1000 iterations; descriptors {samples[:, 2].min():.0f} to "
        f"{samples[:, 2].max():.0f}, threads {samples[:, 3].min():.0f} to {samples[:, 3].max():.0f}"
    )
    return len(set(samples[:, 3])) <= 2


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=20, help="for each number of workers")
    parser.add_argument("--workers", type=int, nargs="*", default=[0, 2])
    parser.add_argument("--processes", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--signals", type=int, default=5, help="SIGTERMs for each of them")
    parser.add_argument("--soak", type=int, default=0, metavar="ITERATIONS")
    parser.add_argument("--iterations", type=int, default=24, help="of a run that is killed")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    args = parser.parse_args()
    random.seed(args.seed)
    print(f"--seed {args.seed}", flush=True)
    is_proven = True
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_data(folder / "data")
        for processes in args.processes:
            for workers in args.workers:
                for number, count in ((signal.SIGKILL, args.kills), (signal.SIGTERM, args.signals)):
                    if count:
                        is_proven &= prove_kills(
                            folder,
                            folder / "data",
                            count,
                            workers,
                            processes,
                            number,
                            args.iterations,
                        )
        if 2 in args.processes:
            is_proven &= prove_silence(folder, folder / "data")
        if args.soak:
            is_proven &= soak(folder, folder / "data", args.soak)
    sys.exit(not is_proven)


if __name__ == "__main__":
    main()
