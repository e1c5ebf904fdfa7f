"""What is said, and kept, when a training step goes wrong."""

import json
import os
import re
import signal

import pytest
import torch
from conftest import QUICK
from detectron2.data import build_detection_train_loader
from detectron2.modeling import build_model
from freeanchor.__main__ import main
from freeanchor.checkpoint import read_checkpoint
from freeanchor.engine import trainer
from freeanchor.engine.step import TrainStep
from torch.amp.grad_scaler import GradScaler


@pytest.fixture
def poison(monkeypatch):
    """Makes a pixel of the first image infinite, in some iterations."""
    forward_backward = TrainStep.forward_backward

    def install(*iterations):
        def run(step, batch):
            if step.iter in iterations:
                batch[0]["image"] = batch[0]["image"].float()
                batch[0]["image"][0, 0, 0] = torch.inf
            return forward_backward(step, batch)

        monkeypatch.setattr(TrainStep, "forward_backward", run)

    return install


def test_loss_that_is_not_finite(tiny, poison, capsys, tmp_path):
    """The message has all there is to know, and the step can be run again."""
    poison(3)
    with pytest.raises(SystemExit) as error:
        tiny("SOLVER.CHECKPOINT_PERIOD", "100")
    found = re.fullmatch(
        r"train_net\.py: Iteration 3: loss_positive nan, loss_negative nan, norm of the gradient "
        r"nan, at the learning rate 0\.0\d+, on (?:\S+\.png \(\d+ x \d+\)(?:, )?){4}. "
        r"`freeanchor replay (\S+)` runs it again and says where it begins\. .*",
        str(error.value),
    )
    assert found
    main(["replay", found[1]])
    assert "Iteration 3: " in (said := capsys.readouterr().out)
    assert "The first output that is not finite is that of an image" in said
    metrics = (tmp_path / "output" / "metrics.json").read_text()
    assert all(json.loads(x, parse_constant=pytest.fail) for x in metrics.splitlines())


def test_replay_finds_the_module(tiny, before_step, capsys, tmp_path):
    """Whose output overflows, though all weights are finite."""

    def overflow(step):
        if step.iter == 1:
            torch.nn.init.constant_(step.model.head.bbox_subnet[0].weight, 1e38)

    before_step(overflow)
    with pytest.raises(SystemExit, match="Iteration 1: loss"):
        tiny("MODEL.RETINANET.NORM", "")
    (file,) = (tmp_path / "output").glob("non_finite_*.pth")
    main(["replay", str(file)])
    assert "not finite is that of head.bbox_subnet.0" in capsys.readouterr().out


def test_replay_of_something_else(tiny):
    """The file is named."""
    output = tiny("SOLVER.MAX_ITER", "1")
    with pytest.raises(SystemExit, match=r"model_final\.pth is not a training step"):
        main(["replay", str(output / "model_final.pth")])


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("PRE_ANCHOR_TOPK", "OF_ANOTHER_VERSION", "OF_ANOTHER_VERSION"),
        ("PRE_ANCHOR_TOPK: 50", "PRE_ANCHOR_TOPK: fifty", "fifty"),
        ("META_ARCHITECTURE: FreeAnchor", "META_ARCHITECTURE: OfMyOwn", "OfMyOwn"),
        ("NUM_CONVS: 1", "NUM_CONVS: 2", r"head\.cls_subnet\.3"),
    ],
)
def test_replay_of_another_version(cfg, tmp_path, old, new, reason):
    """What cannot be built here is said."""
    cfg.MODEL.RETINANET.NUM_CONVS = 1
    step = {"model": build_model(cfg).state_dict(), "batch": [], "iteration": 0}
    assert old in cfg.dump()
    torch.save({**step, "config": cfg.dump().replace(old, new)}, tmp_path / "non_finite.pth")
    with pytest.raises(SystemExit, match=f"^freeanchor replay: .*cannot be replayed .*{reason}"):
        main(["replay", str(tmp_path / "non_finite.pth")])


def test_steps_that_are_skipped(tiny, poison):
    """They leave no trace in the model; one more than allowed ends the run."""
    poison(2, 4)
    output = tiny("SOLVER.SKIP_NON_FINITE", "2", "SOLVER.WARMUP_ITERS", "0")
    log = (output / "log.txt").read_text()
    assert "The step is left out, the 2. of at most 2" in log
    content = read_checkpoint(str(output / "model_final.pth"))
    assert content["trainer"]["skipped"] == 2
    assert all(bool(x.isfinite().all()) for x in content["model"].values())
    # A counter of batch norm: 6 iterations, 2 of which are as if they had not been.
    counter = "backbone.fpn_lateral3.norm.num_batches_tracked"
    assert content["model"][counter] == 4
    with pytest.raises(SystemExit, match="Iteration 4: loss_positive nan"):
        tiny("SOLVER.SKIP_NON_FINITE", "1", output="once")


def test_step_that_is_skipped_in_float16(tiny, poison, before_step):
    """The scaler, of GPUs alone, is ready for the next step."""

    def scale(step):
        if step.iter == 0:
            step.grad_scaler = GradScaler("cpu", init_scale=4.0)

    before_step(scale)
    poison(2)
    output = tiny("SOLVER.SKIP_NON_FINITE", "1", "SOLVER.WARMUP_ITERS", "0")
    content = read_checkpoint(str(output / "model_final.pth"))
    assert content["trainer"]["skipped"] == 1
    assert content["trainer"]["grad_scaler"]["scale"] == 2.0


def test_worker_that_dies(tiny, monkeypatch, tmp_path):
    """The images of the next batch are named, and nothing that was trained is lost."""

    class Deadly(trainer.Mapper):
        def __call__(self, record):
            if record["image_id"] == 9:
                os.kill(os.getpid(), signal.SIGKILL)
            return super().__call__(record)

    monkeypatch.setattr(trainer, "Mapper", Deadly)
    with pytest.raises(SystemExit) as error:
        tiny("DATALOADER.NUM_WORKERS", "1", "SOLVER.CHECKPOINT_PERIOD", "100")
    message = str(error.value)
    images = r"(?:\S+\.png \(\d+ x \d+\)(?:, )?){4}"
    assert re.search(rf"Iteration \d: .* worker died while images such as {images}", message)
    iteration = int(re.search(r"Iteration (\d)", message)[1])
    assert (tmp_path / "output" / f"model_{iteration - 1:07d}.pth").exists()


def test_worker_of_another_loader_that_dies(tiny, monkeypatch):
    """Detectron2's, which a subclass of the trainer may build, does not say what it loads."""

    def build(trainer, cfg):
        def end(record):
            os.kill(os.getpid(), signal.SIGKILL)

        return build_detection_train_loader(cfg, mapper=end)

    monkeypatch.setattr("freeanchor.engine.Trainer.build_train_loader", build)
    with pytest.raises(SystemExit, match="Iteration 0: a data loader worker died while images w"):
        tiny("DATALOADER.NUM_WORKERS", "1")


@pytest.mark.parametrize(
    "fail",
    [
        lambda: torch.empty(2**50),
        lambda: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory")),
    ],
)
def test_out_of_memory(tiny, monkeypatch, fail):
    """The images and their sizes are named, and what needs less."""
    monkeypatch.setattr(TrainStep, "forward_backward", lambda *_: fail())
    with pytest.raises(SystemExit) as error:
        tiny()
    message = str(error.value)
    assert re.search(
        r"Iteration 0: out of memory on cpu, training on \S+\.png \(\d+ x \d+\)", message
    )
    assert "SOLVER.ACCUMULATION_STEPS 2 computes 2 instead of 4 images at once" in message


def test_failure_in_the_last_iteration(tiny, monkeypatch, before_step):
    """It is not followed by an evaluation, in which other processes would wait for this one."""

    def fail(step):
        if step.iter == 5:
            raise RuntimeError("failed")

    monkeypatch.setattr("freeanchor.engine.Trainer.test", lambda *_: pytest.fail("evaluated"))
    before_step(fail)
    with pytest.raises(RuntimeError, match="failed"):
        tiny("DATASETS.TEST", "('tiny',)")


def test_batch_norm_of_one_value(tiny):
    """What PyTorch says of it is told in terms of the run."""
    with pytest.raises(SystemExit) as error:
        tiny("SOLVER.ACCUMULATION_STEPS", "4")
    assert re.search(
        r"Iteration 0: batch norm .* on were (?:\S+\.png \(\d+ x \d+\)(?:, )?){4}, 1 at a time\. "
        r"Raise SOLVER\.IMS_PER_BATCH, lower SOLVER\.ACCUMULATION_STEPS",
        str(error.value),
    )


def test_learning_rate_for_larger_batches(tiny):
    """It is said before the first iteration, with the values that fit; otherwise nothing is."""
    said = "Scaled, it is: SOLVER.BASE_LR 0.015 SOLVER.MAX_ITER 600 "
    keys = ["SOLVER.IMS_PER_BATCH", "2", "SOLVER.BASE_LR", "0.08", "SOLVER.MAX_ITER", "1"]
    log = (tiny(*keys) / "log.txt").read_text()
    assert 0 < log.index(said) < log.index("Starting training")
    assert "Scaled, it is" not in (tiny("SOLVER.MAX_ITER", "1", output="b") / "log.txt").read_text()


def test_config_without_a_learning_rate(tiny, tmp_path):
    """A file that leaves it to the command line (0) has nothing to compare with."""
    path = tmp_path / "own.yaml"
    path.write_text(f"_BASE_: {QUICK}\nSOLVER:\n  BASE_LR: 0.0\n")
    run = tiny(f"--config-file={path}", "SOLVER.BASE_LR", "0.01", "SOLVER.MAX_ITER", "1")
    assert "Scaled, it is" not in (run / "log.txt").read_text()
