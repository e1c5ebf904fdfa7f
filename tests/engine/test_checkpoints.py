"""When checkpoints are written, and how a run goes on from them."""

import errno
import itertools
import json
import os
import re
import signal

import pytest
import torch
from detectron2.engine import hooks
from detectron2.solver import LRMultiplier
from freeanchor.checkpoint import Checkpointer, files, read_checkpoint
from freeanchor.data import register_datasets
from freeanchor.engine import checkpoints
from freeanchor.errors import DatasetError, FileError
from fvcore.common.param_scheduler import StepWithFixedGammaParamScheduler
from tiny_run import difference, result


def names(output):
    return sorted(x.name for x in output.glob("model_*.pth"))


def log(output):
    return (output / "log.txt").read_text()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_signal_saves_and_ends(tiny, before_step, number):
    """After the running iteration; resumed, the run ends as if nothing had been."""
    before_step(lambda step: step.iter == 2 and os.kill(os.getpid(), number))
    handlers = signal.getsignal(number)
    with pytest.raises(SystemExit) as status:
        tiny("SOLVER.CHECKPOINT_PERIOD", "100")
    assert status.value.code == 128 + number
    assert signal.getsignal(number) == handlers
    before_step(lambda step: None)
    output = tiny("--resume")
    assert "iteration 2, which is saved" in log(output)
    assert "Starting training from iteration 3" in log(output)
    if number == signal.SIGTERM:
        assert not difference(result(tiny(output="whole")), result(output))


def test_signal_in_an_evaluation_ends_at_once(tiny, monkeypatch):
    """The run was saved before it."""

    def evaluate(*_):
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("the evaluation went on")

    monkeypatch.setattr("freeanchor.engine.Trainer.test", evaluate)
    keys = ["DATASETS.TEST", "('tiny',)", "TEST.EVAL_PERIOD", "3", "SOLVER.CHECKPOINT_PERIOD", "9"]
    with pytest.raises(SystemExit) as status:
        tiny(*keys)
    assert status.value.code == 128 + signal.SIGTERM
    evaluated = []
    monkeypatch.setattr("freeanchor.engine.Trainer.test", lambda *_: evaluated.append(1) or {})
    assert "Starting training from iteration 3" in log(tiny("--resume", *keys))
    assert len(evaluated) == 2  # that one, and the last


def test_signal_in_the_last_iteration(tiny, before_step, monkeypatch):
    """It is not followed by the evaluation, which may be longer than there is time."""
    monkeypatch.setattr("freeanchor.engine.Trainer.test", lambda *_: pytest.fail("evaluated"))
    before_step(lambda step: step.iter == 5 and os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit) as status:
        tiny("DATASETS.TEST", "('tiny',)")
    assert status.value.code == 128 + signal.SIGTERM


def test_signal_in_the_last_evaluation(tiny, monkeypatch, tmp_path):
    """It ends as one before does, and what was trained is there to be evaluated."""

    def evaluate(*_):
        os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("the evaluation went on")

    monkeypatch.setattr("freeanchor.engine.Trainer.test", evaluate)
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit) as status:
        tiny("DATASETS.TEST", "('tiny',)")
    assert status.value.code == 128 + signal.SIGINT
    assert signal.getsignal(signal.SIGINT) == handler
    assert "SIGINT: ending after iteration 5, which is saved" in log(tmp_path / "output")
    evaluated = []
    monkeypatch.setattr("freeanchor.engine.Trainer.test", lambda *_: evaluated.append(1) or {})
    tiny("--resume", "DATASETS.TEST", "('tiny',)")
    assert evaluated


def test_evaluation_that_fails(tiny, monkeypatch):
    """The iteration before it, which is saved, is not trained a second time."""
    keys = ["DATASETS.TEST", "('tiny',)", "TEST.EVAL_PERIOD", "3", "TEST.BEST_METRIC", ""]
    monkeypatch.setattr("freeanchor.engine.Trainer.test", lambda *_: {})
    expected = result(tiny(*keys, output="whole"))

    def fail(*_):
        raise DatasetError("an image is broken")

    monkeypatch.setattr("freeanchor.engine.Trainer.test", fail)
    with pytest.raises(SystemExit, match="an image is broken"):
        tiny(*keys)
    monkeypatch.setattr("freeanchor.engine.Trainer.test", lambda *_: {})
    output = tiny("--resume", *keys)
    assert "Starting training from iteration 3" in log(output)
    assert not difference(expected, result(output))


def test_minutes(tiny, monkeypatch):
    """A checkpoint is due when they are over, whatever the period in iterations is."""
    clock = itertools.count(0, 30)
    monkeypatch.setattr(checkpoints, "monotonic", lambda: next(clock))
    output = tiny("SOLVER.CHECKPOINT_PERIOD", "100", "SOLVER.CHECKPOINT_MINUTES", "1")
    assert names(output) == ["model_0000001.pth", "model_0000003.pth", "model_final.pth"]


def test_newest_are_kept(tiny):
    """As many as wanted, and the last one besides."""
    keys = ["SOLVER.CHECKPOINT_PERIOD", "1", "SOLVER.CHECKPOINTS_KEPT", "2"]
    assert names(tiny(*keys)) == ["model_0000003.pth", "model_0000004.pth", "model_final.pth"]


def test_disk_that_is_full(tiny, monkeypatch):
    """One sentence, no half file; the run goes on, and its next checkpoint is as good as ever."""
    fsync, calls = os.fsync, []

    def full_at_first(descriptor):
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        if "model_" in path and len(calls) < 2:
            calls.append(path)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    monkeypatch.setattr(files.os, "fsync", full_at_first)
    output = tiny()
    assert names(output) == ["model_final.pth"]
    assert not list(output.glob("*.unfinished"))
    assert len(re.findall(r"model_000000[13]\.pth cannot be written: .*No space left", log(output)))
    assert not difference(result(tiny(output="whole")), result(output))


def test_last_checkpoint_that_cannot_be_written(tiny, before_step, tmp_path):
    """The run ends with an error that says so."""
    before_step(lambda step: step.iter == 4 and (tmp_path / "output").rename(tmp_path / "gone"))
    before_step(lambda step: step.iter == 5 and (tmp_path / "output/model_final.pth").mkdir())
    with pytest.raises(SystemExit, match=r"ended without its checkpoint: \S+final\.pth cannot be"):
        tiny()


def test_second_run_into_a_folder(tiny):
    """It is refused, and --resume goes on."""
    output = tiny("SOLVER.MAX_ITER", "2")
    before = (output / "model_final.pth").read_bytes()
    with pytest.raises(SystemExit, match=r"holds a run already .*: add --resume"):
        tiny("SOLVER.MAX_ITER", "4")
    assert (output / "model_final.pth").read_bytes() == before
    tiny("--resume", "SOLVER.MAX_ITER", "4")
    assert "Starting training from iteration 2" in log(output)
    assert "Nothing is left to train" not in log(output)
    tiny("--resume", "SOLVER.MAX_ITER", "3")
    assert "SOLVER.MAX_ITER 3 is of the whole run, of which 4 iterations are done" in log(output)


def test_training_into_the_folder_of_an_evaluation(tiny, tmp_path):
    """It is refused: a report would show what other weights have found."""
    (tmp_path / "output" / "inference").mkdir(parents=True)
    (tmp_path / "output" / "inference" / "results.json").write_text("{}")
    with pytest.raises(SystemExit, match=r"results of an evaluation .*choose another"):
        tiny()


def test_run_that_was_moved(tiny, train_net, tmp_path):
    """Its config names the folder where it was: --resume does not start anew there."""
    moved = tmp_path / "moved"
    tiny("SOLVER.MAX_ITER", "1").rename(moved)
    triple = ["tiny", tmp_path / "data" / "train.json", tmp_path / "data" / "images"]
    options = ["--resume", "--dataset", *triple, "SOLVER.MAX_ITER", "2"]
    with pytest.raises(SystemExit, match=f"no checkpoint in .*: add OUTPUT_DIR {moved}$"):
        train_net(*options, config=moved / "config.yaml")
    assert not (tmp_path / "output").exists()
    train_net(*options, "OUTPUT_DIR", moved, config=moved / "config.yaml")
    assert "Starting training from iteration 1" in log(moved)


@pytest.mark.parametrize("lost", ["", "last_checkpoint", "config.yaml"])
def test_config_of_a_run_stays(tiny, lost):
    """Through evaluations with other values and a --resume that is refused, until one goes on.

    It is what `freeanchor predict` reads beside the weights. It is not touched either: who is
    killed, or has a full disk, would lose it.
    """
    output = tiny("SOLVER.MAX_ITER", "1", "INPUT.MIN_SIZE_TEST", "64")
    (output / lost).unlink() if lost else None
    path = output / "config.yaml"

    def state():
        return [
            (x.read_text(), x.stat().st_mtime_ns, x.stat().st_ino) for x in output.glob(path.name)
        ]

    before = state()
    test = ["DATASETS.TEST", "('tiny',)", "INPUT.MIN_SIZE_TEST", "48"]
    with pytest.raises(SystemExit, match="not of this model"):
        tiny("--resume", *test, "MODEL.FPN.OUT_CHANNELS", "16")
    assert state() == before
    tiny("--eval-only", "--resume", *test)
    assert state() == before or lost == "config.yaml"
    tiny("--resume", *test, "INPUT.MIN_SIZE_TEST", "50", "SOLVER.MAX_ITER", "2")
    assert "MIN_SIZE_TEST: 50" in path.read_text()


def test_checkpoint_of_an_older_version(tiny):
    """It is gone on from, and what it lacks is said."""
    output = tiny("SOLVER.MAX_ITER", "4")
    path = output / "model_final.pth"
    content = read_checkpoint(str(path))
    trainer = {key: content["trainer"][key] for key in ("iteration", "hooks")}
    torch.save({"model": content["model"], "trainer": trainer, "iteration": 3}, path)
    tiny("--resume")
    assert "Starting training from iteration 4" in log(output)
    lacking = "the momentum of the optimiser, the order of the images, the random numbers"
    assert f"does not hold {lacking}, which start anew" in log(output)


def test_resuming_with_another_learning_rate(tiny):
    """Who resumes with other values means them: they are not taken from the checkpoint."""
    keys = ["SOLVER.MAX_ITER", "8", "SOLVER.WARMUP_ITERS", "0", "SOLVER.CHECKPOINT_PERIOD", "100"]
    keys += ["SOLVER.LR_SCHEDULER_NAME", "WarmupMultiStepLR"]
    output = tiny(*keys, "SOLVER.MAX_ITER", "4")
    tiny("--resume", *keys, "SOLVER.BASE_LR", "0.001", "SOLVER.STEPS", "(6,)")
    rates = [json.loads(x)["lr"] for x in (output / "metrics.json").read_text().splitlines()]
    assert rates == pytest.approx([0.03, 0.0001])
    said = re.search(r"with other values than before \(.*yaml\): (.*)", log(output))[1]
    assert said == (
        "SOLVER.BASE_LR 0.001 instead of 0.03; SOLVER.MAX_ITER 8 instead of 4; "
        "SOLVER.STEPS (6,) instead of [60000, 80000]"
    )


@pytest.mark.parametrize("content", [None, "", "- 1", "a: {", "MINE: 4", b"\xff"])
def test_resuming_without_the_config_before(tiny, content):
    """What cannot be compared does not cost the run."""
    output = tiny("SOLVER.MAX_ITER", "3")
    path = output / "config.yaml"
    path.unlink()
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    tiny("--resume")
    assert "Starting training from iteration 3" in log(output)
    assert "other values" not in log(output)
    assert "SOLVER" in path.read_text()


def test_schedule_without_a_rate_at_its_end(tiny, monkeypatch):
    """A step behind the last iteration does not cost the run, nor its resumption."""

    def build(cfg, optimizer):  # as WarmupStepWithFixedGammaLR of Detectron2's main branch
        number = cfg.SOLVER.MAX_ITER
        steps = StepWithFixedGammaParamScheduler(1.0, num_decays=2, gamma=0.5, num_updates=number)
        return LRMultiplier(optimizer, steps, number)

    monkeypatch.setattr("detectron2.engine.defaults.build_lr_scheduler", build)
    output = tiny("SOLVER.BASE_LR", "0.004")
    assert json.loads((output / "metrics.json").read_text())["lr"] == 0.001
    tiny("--resume", "SOLVER.BASE_LR", "0.004")
    assert "Nothing is left to train" in log(output)


def evaluated_as(monkeypatch, values):
    """Evaluations give these values of AP, one after another."""
    left = iter(values)
    monkeypatch.setattr(
        "freeanchor.engine.Trainer.test",
        lambda *_: {"bbox": {"AP": next(left), "APl": float("nan")}},
    )
    return ["DATASETS.TEST", "('tiny',)", "TEST.EVAL_PERIOD", "1", "SOLVER.CHECKPOINT_PERIOD", "99"]


def test_best_checkpoint(tiny, monkeypatch):
    """It is remembered when the run is resumed, which does not start from it."""
    keys = evaluated_as(monkeypatch, [1.0, 3.0, 2.0])
    output = tiny(*keys, "SOLVER.MAX_ITER", "3")
    assert read_checkpoint(str(output / "model_best.pth"))["iteration"] == 1
    assert (output / "last_checkpoint").read_text() == "model_final.pth"
    (output / "last_checkpoint").unlink()
    keys = evaluated_as(monkeypatch, [2.0, 2.5, 2.0, 4.0])
    tiny("--resume", *keys, "SOLVER.MAX_ITER", "6")
    assert "Starting training from iteration 3" in log(output)
    assert "not better than best score 3.0" in log(output)
    assert read_checkpoint(str(output / "model_best.pth"))["iteration"] == 5
    for line in (output / "metrics.json").read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)  # of NaN


def best_of(output):
    """The metric of model_best.pth."""
    state = read_checkpoint(str(output / "model_best.pth"))["trainer"]
    return state["hooks"]["BestCheckpointer"]["best_metric"]


@pytest.mark.parametrize(("values", "best"), [((3.0, 2.0), 2.0), ((1.0, 3.0, 2.0, 0.5), 2.0)])
def test_best_checkpoint_that_cannot_be_written(tiny, monkeypatch, values, best):
    """It is not the best: what comes after it is only better than what the disk has."""
    save = Checkpointer.save

    def save_without_room(self, name, **kwargs):
        latest = self.checkpointables["trainer"].storage.latest()
        if name == "model_best" and latest["bbox/AP"][0] == 3.0:
            raise FileError(f"{name} cannot be written: the disk is full")
        save(self, name, **kwargs)

    monkeypatch.setattr(Checkpointer, "save", save_without_room)
    keys = [*evaluated_as(monkeypatch, values), "TEST.EARLY_STOPPING", "2"]
    output = tiny(*keys, "SOLVER.MAX_ITER", str(len(values)))
    assert best_of(output) == best
    assert "the disk is full. The run goes on" in log(output)


def test_best_checkpoint_after_a_kill(tiny, monkeypatch):
    """It is newer than the checkpoint that a run goes on from, which was written before it."""
    keys = evaluated_as(monkeypatch, [1.0, 3.0])
    output = tiny(*keys, "SOLVER.MAX_ITER", "2")
    assert best_of(output) == 3.0
    for name in ("model_final.pth", "last_checkpoint"):
        (output / name).unlink()
    assert names(output) == ["model_0000000.pth", "model_best.pth"]
    tiny("--resume", *evaluated_as(monkeypatch, [1.0, 2.0, 2.5]), "SOLVER.MAX_ITER", "3")
    assert best_of(output) == 3.0
    (output / "model_best.pth").unlink()
    tiny("--resume", *evaluated_as(monkeypatch, [1.0, 2.0]), "SOLVER.MAX_ITER", "4")
    assert best_of(output) == 2.0
    assert "gone or damaged" in log(output)


@pytest.mark.parametrize("found", [{}, {"bbox": {"AP": float("nan")}}])
def test_no_best_checkpoint(tiny, monkeypatch, found):
    """Of a data set without annotations, or without objects, it is said that there is none."""
    keys = evaluated_as(monkeypatch, [])
    monkeypatch.setattr("freeanchor.engine.Trainer.test", lambda *_: found)
    output = tiny(*keys, "SOLVER.MAX_ITER", "1")
    assert names(output) == ["model_final.pth"]
    assert "bbox/AP is no number: no model_best.pth is written" in log(output)


def test_best_checkpoint_by_another_metric(tiny, monkeypatch):
    """A value of another metric is nothing to be better than."""
    keys = evaluated_as(monkeypatch, [50.0])
    tiny(*keys, "SOLVER.MAX_ITER", "1")
    monkeypatch.setattr("freeanchor.engine.Trainer.test", lambda *_: {"bbox": {"AP75": 5.0}})
    keys += ["TEST.BEST_METRIC", "bbox/AP75"]
    output = tiny("--resume", *keys, "SOLVER.MAX_ITER", "2")
    assert "not comparable" in log(output)
    assert read_checkpoint(str(output / "model_best.pth"))["iteration"] == 0


@pytest.mark.parametrize(("metric", "expected"), [("bbox/AP", (0,)), ("other/bbox/AP", (1, 2))])
def test_best_checkpoint_of_several_data_sets(tiny, coco, monkeypatch, metric, expected):
    """It is the best on the first of them, unless the metric names another."""
    left = iter([3.0, 1.0, 1.0, 3.0])
    monkeypatch.setattr(
        "freeanchor.engine.Trainer.test",
        lambda *_: {name: {"bbox": {"AP": next(left)}} for name in ("tiny", "other")},
    )
    triple = coco("other", categories=[{"id": 1, "name": "noise"}], category_ids=(1,))
    register_datasets([triple])
    keys = ["DATASETS.TEST", "('tiny', 'other')", "TEST.EVAL_PERIOD", "1", "SOLVER.MAX_ITER", "2"]
    output = tiny(*keys, "TEST.BEST_METRIC", metric)
    assert read_checkpoint(str(output / "model_best.pth"))["iteration"] in expected


def test_early_stopping(tiny, monkeypatch):
    """After two evaluations without a better one, the run ends as if it had been shorter."""
    keys = evaluated_as(monkeypatch, [1.0, 3.0, 2.0, 2.5, 2.0])
    output = tiny(*keys, "SOLVER.MAX_ITER", "20", "TEST.EARLY_STOPPING", "2")
    assert read_checkpoint(str(output / "model_final.pth"))["iteration"] == 4
    assert "AP has not become better for 2 evaluations, since iteration 1" in log(output)
    assert log(output).count("the training ends with the next iteration") == 1  # not at its end


def test_early_stopping_of_a_resumed_run(tiny, monkeypatch):
    """The evaluation behind the checkpoint that it goes on from counts, and counts once."""
    output = tiny(*evaluated_as(monkeypatch, [1.0, 3.0, 2.0]), "SOLVER.MAX_ITER", "3")
    for name in ("model_final.pth", "last_checkpoint"):
        (output / name).unlink()
    keys = evaluated_as(monkeypatch, [3.0, 2.0, 2.5, 9.0])
    tiny("--resume", *keys, "SOLVER.MAX_ITER", "20", "TEST.EARLY_STOPPING", "2")
    assert "Starting training from iteration 2" in log(output)
    assert read_checkpoint(str(output / "model_final.pth"))["iteration"] == 4
    assert best_of(output) == 9.0  # the last of them


def test_early_stopping_with_precise_batch_norm(tiny, monkeypatch):
    """The last iteration, which was not to be the last, has its precise statistics too."""
    keys = [*evaluated_as(monkeypatch, [3.0, 1.0, 1.0]), "TEST.PRECISE_BN.ENABLED", "True"]
    done = []
    monkeypatch.setattr(hooks.PreciseBN, "update_stats", lambda x: done.append(x.trainer.iter))
    tiny(*keys, "SOLVER.MAX_ITER", "20", "TEST.EARLY_STOPPING", "1", "TEST.EVAL_PERIOD", "2")
    assert done == [1, 3, 4]


def test_moving_average(tiny, before_step, train_net, tmp_path):
    """It is the average of the weights, resumed exactly, and what other programs get."""
    keys = ["SOLVER.EMA_DECAY", "0.9", "SOLVER.CHECKPOINTS_KEPT", "0"]
    output = tiny(*keys, "SOLVER.CHECKPOINT_PERIOD", "1")
    name = "head.cls_score.weight"
    expected = None
    for path in names(output):
        content = read_checkpoint(str(output / path))
        value = content["model"][name]
        expected = value if expected is None else 0.9 * expected + 0.1 * value
        assert torch.allclose(content["ema"][f"module.{name}"], expected, atol=1e-7)
    killed = tiny(*keys, "SOLVER.MAX_ITER", "3", "SOLVER.STEPS", "()", output="killed")
    final = read_checkpoint(str(killed / "model_final.pth"))
    assert final["ema"]["n_averaged"] == 3
    exported = tiny("--resume", "--export-safetensors", *keys, output="killed")
    weights = read_checkpoint(str(exported / "model_final.safetensors"))["model"]
    average = read_checkpoint(str(exported / "model_final.pth"))["ema"]
    assert torch.equal(weights[name], average[f"module.{name}"])
    assert not torch.equal(
        weights[name], read_checkpoint(str(exported / "model_final.pth"))["model"][name]
    )


def test_mixed_precision(tiny, before_step):
    """A run in bfloat16 resumes exactly, all that it keeps is in float32, and float32 goes on."""
    keys = ["SOLVER.AMP.ENABLED", "True", "SOLVER.AMP.PRECISION", "bfloat16"]
    whole = tiny(*keys, output="whole")
    before_step(lambda step: step.iter == 2 and os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit):
        tiny(*keys)
    before_step(lambda step: None)
    killed = tiny("--resume", "--export-safetensors", *keys)
    assert "Convolutions in bfloat16" in log(killed)
    assert not difference(result(whole), result(killed))
    floats = {x.dtype for x in result(killed).values() if x.is_floating_point()}
    assert floats == {torch.float32}
    weights = read_checkpoint(str(killed / "model_final.safetensors"))["model"]
    assert not difference(weights, read_checkpoint(str(killed / "model_final.pth"))["model"])
    tiny("--resume", "SOLVER.MAX_ITER", "7")
    assert "Convolutions in float32, as AMP.ENABLED is False" in log(killed)
    assert result(killed).keys() == result(whole).keys()


def test_accumulation_and_clipping(tiny):
    """In parts the run is the same; clipped by the norm of all gradients it moves less."""
    keys = ["SOLVER.MAX_ITER", "2", "MODEL.RESNETS.NORM", "FrozenBN", "MODEL.FPN.NORM", ""]
    keys += ["MODEL.RETINANET.NORM", ""]
    whole, parts = tiny(*keys), tiny(*keys, "SOLVER.ACCUMULATION_STEPS", "2", output="parts")
    one, other = result(whole), result(parts)
    assert all(torch.allclose(x.double(), other[k].double(), atol=1e-5) for k, x in one.items())
    assert difference(one, other)  # rounding, or the key does nothing
    clip = [
        "SOLVER.CLIP_GRADIENTS.ENABLED",
        "True",
        "SOLVER.CLIP_GRADIENTS.CLIP_TYPE",
        "full_model",
    ]
    keys += [*clip, "SOLVER.CLIP_GRADIENTS.CLIP_VALUE", "0.01", "SOLVER.WEIGHT_DECAY", "0.0"]
    momentum = result(tiny(*keys, "SOLVER.MAX_ITER", "1", output="clipped"))
    norms = [x.norm() for k, x in momentum.items() if k.startswith("momentum")]
    assert torch.stack(norms).norm().item() == pytest.approx(0.01, rel=1e-3)
    with pytest.raises(SystemExit, match=r"IMS_PER_BATCH 4 is no multiple of 1 processes x .* 3"):
        tiny("SOLVER.ACCUMULATION_STEPS", "3", output="odd")


def test_newest_are_not_those_with_the_highest_iteration(tiny, before_step):
    """A run that goes on with larger batches has fewer iterations: its checkpoints are kept."""
    keys = ["SOLVER.REFERENCE_WORLD_SIZE", "1", "SOLVER.MAX_ITER", "12"]
    keys += ["SOLVER.CHECKPOINTS_KEPT", "2"]
    output = tiny(*keys, "SOLVER.IMS_PER_BATCH", "2")
    assert names(output) == ["model_0000007.pth", "model_0000009.pth", "model_final.pth"]
    before_step(lambda step: step.iter == 6 and os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit):
        tiny("--resume", *keys, "SOLVER.IMS_PER_BATCH", "4", "SOLVER.CHECKPOINT_PERIOD", "100")
    assert (output / "last_checkpoint").read_text() == "model_0000006.pth"
    assert names(output) == ["model_0000006.pth", "model_0000009.pth", "model_final.pth"]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ((), ("SOLVER.OPTIMIZER", "AdamW")),
        (("SOLVER.OPTIMIZER", "AdamW"), ("SOLVER.OPTIMIZER", "SGD")),
        ((), ("SOLVER.BACKBONE_LR_FACTOR", "0.5")),
    ],
)
def test_resuming_with_another_optimiser(tiny, first, second):
    """Its momentum would be that of other parameters: it starts anew, which is said."""
    output = tiny("SOLVER.MAX_ITER", "2", *first)
    tiny("--resume", "SOLVER.MAX_ITER", "3", *second)
    assert "does not hold the momentum of this optimiser" in log(output)
    optimizer = read_checkpoint(str(output / "model_final.pth"))["trainer"]["optimizer"]
    kept = {key for x in optimizer["state"].values() for key in x}
    assert ("exp_avg" in kept) == ("AdamW" in second)
    assert ("momentum_buffer" in kept) != ("AdamW" in second)


def test_average_of_a_run_that_is_done(tiny, monkeypatch):
    """Switched on when no iteration is left, it is the weights, not what the model began with."""
    evaluated = []
    monkeypatch.setattr(
        "freeanchor.engine.Trainer.test",
        lambda _, cfg, model: evaluated.append(model.head.cls_score.weight.clone()) or {},
    )
    keys = ["DATASETS.TEST", "('tiny',)", "TEST.EVAL_PERIOD", "0"]
    tiny(*keys)
    tiny("--resume", *keys, "SOLVER.EMA_DECAY", "0.9")
    assert torch.equal(*evaluated)


def test_average_with_precise_batch_norm(tiny):
    """The statistics are those of the average, which is evaluated, and not of the last weights."""
    name = "backbone.fpn_lateral3.norm.running_var"
    keys = ["SOLVER.EMA_DECAY", "0.9", "SOLVER.MAX_ITER", "2", "TEST.PRECISE_BN.NUM_ITER", "3"]
    weights, averages = [], []
    for enabled in ("False", "True"):
        output = tiny(*keys, "TEST.PRECISE_BN.ENABLED", enabled, output=enabled)
        content = read_checkpoint(str(output / "model_final.pth"))
        weights.append(content["model"][name])
        averages.append(content["ema"][f"module.{name}"])
    assert torch.equal(*weights)
    assert not torch.allclose(*averages, rtol=0.1)


def test_precise_batch_norm_of_a_resumed_run(tiny):
    """It is of the same images as that of an uninterrupted one."""
    keys = ["TEST.PRECISE_BN.ENABLED", "True", "TEST.PRECISE_BN.NUM_ITER", "2"]
    output = tiny(*keys, "TEST.EVAL_PERIOD", "2")
    expected = result(output)
    for name in ("model_final.pth", "last_checkpoint"):
        (output / name).unlink()
    tiny("--resume", *keys, "TEST.EVAL_PERIOD", "2")
    assert "Starting training from iteration 4" in log(output)
    assert not difference(expected, result(output))
