"""The proof that no run is lost, in a shortened form, and a group that torchrun restarts."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from conftest import REPOSITORY
from tiny_run import command, difference, result, write_data

HERE = Path(__file__).parent
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def test_killed_runs_end_as_if_they_had_not_been():
    """Three kills with workers, one in two processes, and one that hangs: see prove_resume.py."""
    for options in (["--kills=3", "--workers=2"], ["--kills=1", "--workers=0", "--processes=2"]):
        program = [sys.executable, HERE / "prove_resume.py", "--iterations=12", "--signals=0"]
        done = subprocess.run(
            [*program, "--processes=1", *options],
            env=ENVIRONMENT,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr


def _workers(agent):
    """The processes that an agent of torchrun has started."""
    children = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()
    return [int(x) for x in children]


def test_torchrun_restarts_a_group(tmp_path):
    """Two agents as two nodes: a worker is killed, and both go on from the last checkpoint."""
    write_data(tmp_path / "data")
    runs = {}
    for name in ("whole", "killed"):
        options = ["SOLVER.MAX_ITER", "20", "DATALOADER.NUM_WORKERS", "0", "SOLVER.BASE_LR", "0.01"]
        arguments = command(tmp_path / "data", tmp_path / name, *options)
        meeting = f"127.0.0.1:{20000 + os.getpid() % 20000 + len(runs)}"
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2"]
        torchrun += ["--nproc-per-node=1", "--max-restarts=1", "--rdzv-backend=c10d"]
        torchrun += [f"--rdzv-endpoint={meeting}", REPOSITORY / "train_net.py", *arguments]
        log = (tmp_path / f"{name}.txt").open("w")
        # Otherwise the agents count restarts differently, if one sees the other's first, and the
        # processes of the new group do not find each other (PyTorch 2.11).
        environment = {**ENVIRONMENT, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        agents = [
            subprocess.Popen(torchrun, env=environment, stdout=log, stderr=log) for _ in (0, 1)
        ]
        if name == "killed":
            while not (tmp_path / name / "last_checkpoint").exists():
                assert agents[0].poll() is None, (tmp_path / f"{name}.txt").read_text()
                time.sleep(0.05)
            os.kill(_workers(agents[1])[0], signal.SIGKILL)
        statuses = [x.wait() for x in agents]
        log.close()
        assert statuses == [0, 0], (tmp_path / f"{name}.txt").read_text()[-3000:]
        runs[name] = result(tmp_path / name)
    said = (tmp_path / "killed" / "log.txt").read_text()
    assert said.count("Starting training from iteration") == 2
    assert "Starting training from iteration 0" in said
    assert not difference(runs["whole"], runs["killed"])
