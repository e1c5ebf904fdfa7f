"""Several processes: one gradient, one evaluation, one way to start them."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY
from freeanchor.engine.processes import adopt_slurm

HERE = Path(__file__).parent
LTM_CASES = ("apart", "no objects", "shared", "shared, in bags", "shared, in parts")
# What is there already may be a checkout of Detectron2 to test with.
PATHS = [str(REPOSITORY / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
# For processes that share two cores with others.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(PATHS)}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What one, two and three processes compute, see in_processes.py."""
    done = subprocess.run(
        [sys.executable, HERE / "in_processes.py", tmp_path_factory.mktemp("processes")],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    "case",
    [
        "few and many, 2 processes",
        "with empty, 2 processes",
        "no objects, 2 processes",
        "with empty, 3 processes",
        "batch norm",
    ],
)
def test_global_gradient_is_that_of_one_batch(results, case):
    """With 1 + 1 and 10 + 10 objects, without any in a process or all of them, and with SyncBN."""
    assert results[f"global, {case}"] < 1e-5


def test_local_gradient_is_the_mean(results):
    """Each process divides by its own objects, as in the paper, which is not the same."""
    assert results["local"] < 1e-5
    assert results["local and global"] > 0.1


@pytest.mark.parametrize("processes", [1, 2])
def test_accumulated_gradient_is_that_of_one_batch(results, processes):
    """In parts with 2 and 20 objects."""
    assert results[f"accumulated, {processes} processes"] < 1e-5


@pytest.mark.parametrize("config", ["ltm", "ltm_af"])
def test_gradient_of_ltm(results, config):
    """That of one batch where bags share no pair, else but for the pairs that background is over.

    Also where a process has no objects, or none has.
    """
    found = {name: results[f"{config}, {name}"] for name in LTM_CASES}
    assert found.pop("shared") > 1e-3  # the background alone
    assert all(difference < 1e-5 for difference in found.values()), found


def test_evaluation_in_processes(results):
    """Five images give the same in one, two and three processes."""
    one, two, three = results["evaluation"]
    assert 0 < float(one["bbox"]["AP"]) < 100
    assert one == two == three


def test_processes_evaluate_one_model(results):
    """Each has trained its own statistics of batch norm; evaluated are those that are saved."""
    assert results["statistics"] == [0, 0]


def test_processes_load_the_same(results):
    """Where a folder is not shared, they agree on what is there, or say that they differ."""
    assert all("have loaded different weights" in x for x in results["weights"])
    assert results["resumed"] == [0, 0]


def test_processes_have_the_same_images(results):
    """In training and evaluation, each would take another part than that which is left to it."""
    for said in results["ordered"]:
        assert len(said) == 2
        assert all(x.startswith("ordered: the processes have other images") for x in said)


@pytest.fixture
def restarted(tiny, monkeypatch):
    """Trains, or evaluates, as the process of a group that torchrun has started again."""

    def run(*options):
        for name, value in {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1}.items():
            monkeypatch.setenv(name, str(value))
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
        # The group is that of this process alone.
        monkeypatch.setattr(sys.modules["freeanchor.engine.launch"], "join_others", lambda _: None)
        monkeypatch.setattr("torch.distributed.destroy_process_group", lambda: None)
        return tiny(*options)

    return run


def test_restart_goes_on_with_its_own_run_alone(tiny, restarted):
    """And not with one that was there before, as the first start was refused for it."""
    output = tiny("SOLVER.MAX_ITER", "3")
    (output / "model_final.pth").unlink()
    before = (output / "config.yaml").read_bytes()
    with pytest.raises(SystemExit, match=r"holds a run already \(last_checkpoint\)"):
        restarted("SOLVER.MAX_ITER", "3", "SOLVER.BASE_LR", "0.001")
    assert (output / "config.yaml").read_bytes() == before
    assert not (output / "model_final.pth").exists()
    restarted("SOLVER.MAX_ITER", "3")
    assert (output / "model_final.pth").exists()
    assert "Starting training from iteration 2" in (output / "log.txt").read_text()


def test_restarted_evaluation_is_of_the_weights_that_it_names(tiny, restarted, tmp_path):
    """And not of the last checkpoint of its folder."""
    output = tiny("SOLVER.MAX_ITER", "1")
    weights = shutil.copy(output / "model_final.pth", tmp_path / "named.pth")
    restarted("--eval-only", "DATASETS.TEST", "('tiny',)", "MODEL.WEIGHTS", weights)
    said = (output / "log.txt").read_text()
    assert said.rpartition("Loading from ")[2].startswith(str(weights))


def test_slurm_variables():
    """A step of several tasks gets torchrun's variables; a batch script or one task does not."""
    step = {
        "SLURM_JOB_ID": "40123",
        "SLURM_STEP_NUM_TASKS": "8",
        "SLURM_STEP_NODELIST": "gpu[07-08],login1",
        "SLURM_PROCID": "5",
        "SLURM_LOCALID": "1",
        "SLURM_NODEID": "1",
    }
    environment = dict(step)
    adopt_slurm(environment)
    assert {k: v for k, v in environment.items() if k not in step} == {
        "RANK": "5",
        "WORLD_SIZE": "8",
        "LOCAL_RANK": "1",
        "GROUP_RANK": "1",
        "MASTER_ADDR": "gpu07",
        "MASTER_PORT": "20123",
    }
    for environment in (
        {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"},
        {**step, "SLURM_STEP_NUM_TASKS": "1"},
        {**step, "RANK": "0"},  # of torchrun, in a step
    ):
        before = dict(environment)
        adopt_slurm(environment)
        assert environment == before
