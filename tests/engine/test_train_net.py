"""The command line: training, resuming, evaluating, and what it refuses."""

import json
import re

import pytest
import torch
from conftest import GOLDEN, make_it_detect
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import BACKBONE_REGISTRY, build_model
from freeanchor.__main__ import main
from freeanchor.checkpoint import Checkpointer, convert, read_checkpoint
from freeanchor.config import read_config
from freeanchor.engine import Trainer, argument_parser, build_config, defaults
from freeanchor.visualization import Run, read_metrics, read_run

MMDET = GOLDEN / "mmdet_r50.pth"
TINY = [
    *("SOLVER.MAX_ITER", "3", "SOLVER.IMS_PER_BATCH", "2", "SOLVER.WARMUP_ITERS", "0"),
    *("SOLVER.CHECKPOINT_PERIOD", "2", "DATALOADER.NUM_WORKERS", "0"),
    *("INPUT.MIN_SIZE_TRAIN", "(64,)", "INPUT.MIN_SIZE_TEST", "64"),
    *("MODEL.RETINANET.SCORE_THRESH_TEST", "0.0"),
]


@pytest.fixture
def data_options(coco):
    """Own data with gaps in the ids of the classes, as on the command line."""
    train, val = coco(category_ids=(4, 7, 90)), coco(name="val", category_ids=(4, 7, 90))
    names = ["DATASETS.TRAIN", "('train',)", "DATASETS.TEST", "('val',)"]
    return ["--dataset", *train, "--dataset", *val], names


def test_trains_resumes_and_evaluates(train_net, data_options, tmp_path):
    """One run on own data: checkpoints, logs, AP, result file; then --resume; then pictures."""
    register, names = data_options
    output = tmp_path / "output"
    # AMP is for CUDA: without it, it is switched off, not an error.
    options = [*names, *TINY, "OUTPUT_DIR", output, "SOLVER.AMP.ENABLED", "True"]
    train_net(*register, *options)
    assert (output / "last_checkpoint").read_text() == "model_final.pth"
    metrics = read_metrics(output / "metrics.json")
    assert metrics[-1]["iteration"] == 3
    assert "bbox/AP" in metrics[-1]
    assert {"loss_positive", "loss_negative", "freeanchor/anchors_per_bag"} <= set(metrics[0])
    results = output / "inference" / "val" / "coco_instances_results.json"
    detections = json.loads(results.read_text())
    assert {d["category_id"] for d in detections} <= {4, 7, 90}
    assert {d["image_id"] for d in detections} == {1, 2, 3, 4}
    assert "NUM_CLASSES: 3" in (output / "config.yaml").read_text()
    assert torch.cuda.is_available() or "running on the CPU" in (output / "log.txt").read_text()

    for name in ("train", "val"):
        forget(name)
    train_net("--resume", *register, *options, "SOLVER.MAX_ITER", "5")
    assert "Starting training from iteration 3" in (output / "log.txt").read_text()
    assert read_metrics(output / "metrics.json")[-1]["iteration"] == 5

    forget("val")
    several = ["--checkpoints", "model_0000001.pth", "model_final.pth"]
    for count, more, images in (("2", several, [1, 4]), ("1", [], [1])):
        options = ["--num-images", count, *register[4:], *more]
        main(["visualize", str(output), *options])
        pictures = sorted(p.name for p in (output / "pictures").iterdir())
        expected = [f"val_{i}{kind}.png" for i in images for kind in ("", "_matching")]
        assert pictures == sorted(["curves.png", *expected])  # and none of the call before


def test_verdict(train_net, data_options, run_folder, tmp_path):
    """TEST.EXPECTED_RESULTS: the log says whether they are met, and if not the status is 1."""
    register, names = data_options
    options = [*names, *TINY, "MODEL.WEIGHTS", run_folder / "model_final.pth", "OUTPUT_DIR"]

    def evaluate(output, expected, task="bbox"):
        results = ("TEST.EXPECTED_RESULTS", f"[['{task}', 'AP', {expected}, 20]]")
        train_net("--eval-only", *register, *options, tmp_path / output, *results)

    evaluate("met", expected=0)  # noise
    assert "Results verification passed" in (tmp_path / "met" / "log.txt").read_text()
    for output, expected, task in (("missed", 90, "bbox"), ("unknown", 0, "box")):
        forget("train")
        forget("val")
        with pytest.raises(SystemExit) as status:
            evaluate(output, expected, task)
        assert status.value.code == 1
        assert "Result verification failed" in (tmp_path / output / "log.txt").read_text()


def forget(name):
    """A new process would not know the data set."""
    DatasetCatalog.remove(name)
    MetadataCatalog.remove(name)


def test_eval_only_of_a_retinanet_checkpoint(train_net, data_options, cfg, tmp_path):
    """--eval-only with RetinaNet's weights gives RetinaNet's detections, image by image."""
    register, names = data_options
    cfg.MODEL.META_ARCHITECTURE = "RetinaNet"
    retinanet = build_model(cfg)
    torch.nn.init.normal_(retinanet.head.cls_score.weight, std=0.2)
    DetectionCheckpointer(retinanet, str(tmp_path)).save("retinanet")
    options = [*names, *TINY, "MODEL.WEIGHTS", tmp_path / "retinanet.pth"]
    found = {}
    for architecture in ("RetinaNet", "FreeAnchor"):
        output = tmp_path / architecture
        extra = ["MODEL.META_ARCHITECTURE", architecture, "OUTPUT_DIR", output]
        train_net("--eval-only", *register, *options, *extra)
        file = output / "inference" / "val" / "coco_instances_results.json"
        found[architecture] = json.loads(file.read_text())
        forget("train")
        forget("val")
    assert len(found["RetinaNet"]) > 40
    assert found["FreeAnchor"] == found["RetinaNet"]


def test_weights_of_another_project(train_net, data_options, tmp_path):
    """They are converted on the fly with the config that convert writes, and exported.

    Classes are found by their names, which are in another order there.
    """
    register, names = data_options
    theirs = read_checkpoint(str(MMDET))
    theirs["meta"]["CLASSES"] = ("class 90", "class 4", "class 7")
    theirs["state_dict"]["bbox_head.retina_cls.bias"].view(-1, 3)[:, 0] = 20  # of the first
    torch.save(theirs, tmp_path / "mmdet.pth")
    main(["convert", str(tmp_path / "mmdet.pth"), str(tmp_path / "converted.pth")])
    found = {}
    for weights in (
        tmp_path / "mmdet.pth",
        tmp_path / "converted.pth",
        tmp_path / "mmdet" / "model_final.safetensors",
    ):
        output = tmp_path / weights.stem
        options = [*names, *TINY, "MODEL.WEIGHTS", weights, "OUTPUT_DIR", output]
        train_net(
            "--eval-only",
            "--export-safetensors",
            *register,
            *options,
            config=tmp_path / "converted.yaml",
        )
        file = output / "inference" / "val" / "coco_instances_results.json"
        found[weights.stem] = json.loads(file.read_text())
        forget("train")
        forget("val")
    assert len(found["converted"]) > 40
    assert {x["category_id"] for x in found["converted"]} == {90}
    assert found["mmdet"] == found["converted"] == found["model_final"]


def test_training_from_weights_of_another_project(train_net, data_options, tmp_path):
    """Fine-tuning to other classes; and the weights as .safetensors beside the .pth."""
    register, names = data_options
    cfg = convert(read_checkpoint(str(MMDET)), str(MMDET)).build_config()
    cfg.MODEL.FREEANCHOR.CLASS_NAMES = []
    (tmp_path / "mmdet.yaml").write_text(cfg.dump())
    output = tmp_path / "output"
    options = [*names, *TINY, "SOLVER.REFERENCE_WORLD_SIZE", "0", "OUTPUT_DIR", output]
    train_net(
        "--export-safetensors",
        *register,
        *options,
        "MODEL.WEIGHTS",
        MMDET,
        config=tmp_path / "mmdet.yaml",
    )
    assert "Loaded 291 of 293 tensors" in (output / "log.txt").read_text()
    exported = read_checkpoint(str(output / "model_final.safetensors"))["model"]
    saved = read_checkpoint(str(output / "model_final.pth"))["model"]
    assert exported.keys() == saved.keys()
    assert all(torch.equal(exported[k], v) for k, v in saved.items())


def test_weights_that_are_not_there(train_net, data_options, tmp_path):
    """They are missed before a model is built, also by training."""
    register, names = data_options
    output = tmp_path / "output"
    said = {"nowhere.pth": "There is no file nowhere.pth", str(tmp_path): f"{tmp_path} is a folder"}
    for weights, expected in said.items():
        for extra in ((), ("--eval-only",)):
            options = ["MODEL.WEIGHTS", weights, "OUTPUT_DIR", output]
            with pytest.raises(SystemExit, match=f"train_net.py: {expected}"):
                train_net(*extra, *register, *names, *options)
            forget("train")
            forget("val")
    assert not output.exists()


def test_output_below_a_file(train_net, data_options, tmp_path):
    """What is in the way is named, before any work."""
    register, names = data_options
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match=f"folder to write to: {tmp_path}/file is a file"):
        train_net(*register, *names, "OUTPUT_DIR", tmp_path / "file" / "output")


def test_evaluation_of_other_classes(train_net, data_options, tmp_path, cfg):
    """AP of a random predictor is not what was asked for."""
    register, names = data_options
    cfg.MODEL.RETINANET.NUM_CLASSES = 5
    DetectionCheckpointer(build_model(cfg), str(tmp_path)).save("five")
    options = [*names, *TINY, "OUTPUT_DIR", tmp_path / "output"]
    with pytest.raises(SystemExit, match=r"five\.pth are not of this model.*head\.cls_score"):
        train_net("--eval-only", *register, *options, "MODEL.WEIGHTS", tmp_path / "five.pth")


def test_resuming_from_files_that_are_damaged(train_net, data_options, tmp_path):
    """The newest checkpoint that is whole is taken, and if none is, the newest is named."""
    register, names = data_options
    output = tmp_path / "output"
    options = [*names, *TINY, "OUTPUT_DIR", output, "SOLVER.MAX_ITER", "5"]
    train_net(*register, *options)
    forget("train")
    forget("val")
    (output / "model_final.pth").unlink()
    newest, older = output / "model_0000003.pth", output / "model_0000001.pth"
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1  # which PyTorch would not notice
    newest.write_bytes(content)
    train_net("--resume", *register, *options)
    forget("train")
    forget("val")
    log = (output / "log.txt").read_text()
    assert re.search(r"final\.pth, \S+0003\.pth: gone, empty or damaged. .*model_0000001\.pth", log)
    assert "Starting training from iteration 2" in log
    for path in output.glob("model_*.pth"):
        path.write_bytes(path.read_bytes()[: -len(content) // 3])
    older.write_bytes(b"")
    with pytest.raises(SystemExit, match=r"train_net\.py: \S+model_final\.pth is damaged"):
        train_net("--resume", *register, *options)


def test_hostile_config(train_net, tmp_path):
    """It is refused with its name."""
    path = tmp_path / "hostile.yaml"
    path.write_text(f"OUTPUT_DIR: !!python/object/apply:os.mkdir ['{tmp_path / 'canary'}']\n")
    with pytest.raises(SystemExit, match=r"hostile\.yaml: .*Python objects could run code"):
        train_net(config=path)
    assert not (tmp_path / "canary").exists()


def test_evaluation_with_the_classes_in_another_order(train_net, coco, tmp_path, cfg):
    """Data sets are brought to the classes of the weights by name; AP is the same."""
    cfg.MODEL.FREEANCHOR.CLASS_NAMES = ["class 1", "class 2", "class 3"]
    model = build_model(cfg)
    make_it_detect(model)
    Checkpointer(model, cfg, str(tmp_path)).save("own")
    images = coco(name="val")[2]
    path = tmp_path / "val.json"
    content = json.loads(path.read_text())
    shuffled = {1: 12, 2: 10, 3: 11}
    for x in content["annotations"]:
        x["category_id"] = shuffled[x["category_id"]]
    content["categories"] = [{"id": j, "name": f"class {i}"} for i, j in shuffled.items()]
    (tmp_path / "other.json").write_text(json.dumps(content))
    scores, found = {}, {}
    for file in (path, tmp_path / "other.json"):
        output = tmp_path / file.stem
        register = ["--dataset", "val", file, images, "DATASETS.TEST", "('val',)", *TINY]
        options = ["MODEL.WEIGHTS", tmp_path / "own.pth", "OUTPUT_DIR", output]
        done = train_net("--eval-only", *register, *options)
        assert done is not None
        results = output / "inference" / "val" / "coco_instances_results.json"
        found[file.stem] = json.loads(results.read_text())
        scores[file.stem] = {x["score"]: x["category_id"] for x in found[file.stem]}
        forget("val")
    assert len(found["val"]) == len(found["other"]) > 10
    assert scores["other"] == {s: shuffled[c] for s, c in scores["val"].items()}


def test_evaluation_into_the_folder_of_a_training(train_net, data_options, run_folder, tmp_path):
    """The config stays the training's; pictures and figures of reports are of one evaluation."""
    register, names = data_options
    output = tmp_path / "output"
    train_net(*register, *names, *TINY, "OUTPUT_DIR", output)
    config = (output / "config.yaml").read_text()
    cfg = read_run(output)
    run = Run("", cfg, read_metrics(output / "metrics.json"))
    trained = run.last_evaluated("val")
    assert trained["bbox/AP"] == pytest.approx(run.evaluated("val")[-1]["bbox/AP"], nan_ok=True)
    forget("train")
    forget("val")
    other = ["MODEL.WEIGHTS", run_folder / "model_final.pth", "TEST.DETECTIONS_PER_IMAGE", "7"]
    train_net("--eval-only", *register, *names, *TINY, *other, "OUTPUT_DIR", output)
    assert (output / "config.yaml").read_text() == config
    figures = run.last_evaluated("val")
    path = output / "inference" / "val" / "coco_instances_results.json"
    assert len(json.loads(path.read_text())) > 0
    assert figures["calibration/ECE"] > 0
    assert figures["calibration/ECE"] != trained["calibration/ECE"]


def test_wrong_number_of_classes(train_net, data_options, tmp_path):
    """It ends with both numbers, before a model is built or a file is written."""
    register, names = data_options
    output = tmp_path / "output"
    with pytest.raises(SystemExit, match="NUM_CLASSES is 80, but train has 3 classes"):
        train_net(*register, *names, "MODEL.RETINANET.NUM_CLASSES", "80", "OUTPUT_DIR", output)
    assert not output.exists()


def test_missing_test_image_is_found_before_training(train_net, coco, tmp_path):
    """Not after hours, when the evaluation begins."""
    train, val = coco(), coco(name="val")
    (tmp_path / "val" / "3.png").unlink()
    options = ["--dataset", *train, "--dataset", *val, "DATASETS.TRAIN", "('train',)"]
    output = tmp_path / "output"
    with pytest.raises(SystemExit, match=r"val.3\.png is missing"):
        train_net(*options, "DATASETS.TEST", "('val',)", *TINY, "OUTPUT_DIR", output)
    assert not (output / "metrics.json").exists()


@pytest.mark.parametrize("num_workers", [0, 1])
def test_damaged_image_in_training(train_net, data_options, tmp_path, num_workers):
    """Damage that only decoding finds: if all images have it, one sentence ends the run."""
    register, names = data_options
    for path in (tmp_path / "train").iterdir():
        content = path.read_bytes()
        path.write_bytes(content[:41] + bytes([255] * 20) + content[61:])
    options = [*names, *TINY, "OUTPUT_DIR", tmp_path / "output"]
    with pytest.raises(SystemExit) as error:
        train_net(*register, *options, "DATALOADER.NUM_WORKERS", num_workers)
    assert re.fullmatch(r"train_net\.py: \S+\.png cannot be read: .*", str(error.value))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["DATASETS.TRAIN", "()"], "DATASETS.TRAIN is empty"),
        (["SOLVER.REFERENCE_WORLD_SIZE", "8"], "IMS_PER_BATCH 2 is no multiple of .* 8"),
        (["DATASETS.TEST", "('val', 'val')"], "DATASETS.TEST has a data set twice: val, val"),
        (
            ["TEST.AUG.ENABLED", "True", "TEST.AUG.MIN_SIZES", "()"],
            r"TEST\.AUG\.MIN_SIZES is empty",
        ),
        *(
            (
                ["MODEL.META_ARCHITECTURE", "ProposalNetwork", f"TEST.{key}", "True"],
                rf"TEST\.{key} is of models with .*, and MODEL\.META_ARCHITECTURE is Proposal",
            )
            for key in ("NMS_RECALL", "PROPOSAL_RECALL", "AUG.ENABLED")
        ),
        (["MODEL.LOAD_PROPOSALS", "True"], "MODEL.LOAD_PROPOSALS: .* leave it out"),
        (["SOLVER.MAX_ITER", "0"], r"SOLVER\.MAX_ITER must be at least 1, got 0"),
        (["SOLVER.MAX_ITER", "-5"], r"SOLVER\.MAX_ITER must be at least 1, got -5"),
        (["SOLVER.IMS_PER_BATCH", "0"], r"SOLVER\.IMS_PER_BATCH must be at least 1"),
        (["SOLVER.ACCUMULATION_STEPS", "0"], r"SOLVER\.ACCUMULATION_STEPS must be at least 1"),
        (["OUTPUT_DIR", ""], "OUTPUT_DIR is empty"),
        (
            ["INPUT.MIN_SIZE_TRAIN", "(80,64)", "INPUT.MIN_SIZE_TRAIN_SAMPLING", "range"],
            r"INPUT\.MIN_SIZE_TRAIN must be the smaller size first, got \(80, 64\)",
        ),
        (
            ["--resume"],
            "^train_net.py: --resume comes behind keys of the config: put it before them$",
        ),
        (["SEED", "99999999999"], r"SEED must be below 2 \*\* 32, got 99999999999"),
        (["SOLVER.EMA_DECAY", "1.0"], r"EMA_DECAY must be at least 0 and below 1, got 1\.0"),
        (["SOLVER.WARMUP_ITERS", "-1"], r"SOLVER\.WARMUP_ITERS must be at least 0, got -1"),
        (["INPUT.MAX_SIZE_TEST", "0"], r"INPUT\.MAX_SIZE_TEST must be at least 1, got 0"),
        (
            ["MODEL.PIXEL_STD", "[1.0,-1.0,1.0]"],
            r"MODEL\.PIXEL_STD must be above 0, got \[1\.0, -1",
        ),
        *(
            (
                [f"MODEL.ANCHOR_GENERATOR.{key}", "[[]]"],
                rf"GENERATOR\.{key} must have .*got \[\[\]\]",
            )
            for key in ("SIZES", "ASPECT_RATIOS")
        ),
        *(
            ([f"MODEL.{key}", "0"], rf"MODEL\.{key} must be at least 1, got 0")
            for key in ("FPN.OUT_CHANNELS", "RESNETS.STEM_OUT_CHANNELS", "ROI_BOX_HEAD.FC_DIM")
        ),
        (["MODEL.RETINANET.BBOX_REG_WEIGHTS", "(10.0,5.0)"], r"BBOX_REG_WEIGHTS must be four"),
        *(
            (
                ["INPUT.CROP.ENABLED", "True", "INPUT.CROP.TYPE", kind, "INPUT.CROP.SIZE", size],
                rf"INPUT\.CROP\.{expected}",
            )
            for kind, size, expected in (
                ("relative", "[1.5,0.5]", r"SIZE must be two shares .*, got \[1\.5, 0\.5\]"),
                ("relative_range", "[0.5,1.5]", "SIZE must be two shares"),
                ("absolute", "[0.9,0.9]", "SIZE must be two numbers of pixels"),
                ("absolute_range", "[300]", "SIZE must be two"),
                ("absolute_range", "[300,200]", "SIZE must be the smaller size first"),
                ("share", "[0.9,0.9]", "TYPE must be one of relative, .*, got share"),
            )
        ),
        (["TEST.EARLY_STOPPING", "1"], r"EARLY_STOPPING needs TEST\.EVAL_PERIOD, TEST\.BEST_MET"),
        (
            ["SOLVER.BASE_LR", "fast"],
            r"^train_net\.py: SOLVER\.BASE_LR fast: Type mismatch .*: SOLVER\.BASE_LR$",
        ),
        (["INPUT.MIN_SIZE_TRAIN", "()"], r"INPUT\.MIN_SIZE_TRAIN is empty"),
        *(
            (["TEST.EXPECTED_RESULTS", x], r"EXPECTED_RESULTS has .*: give lists of task, metric")
            for x in ("[['bbox', 'AP']]", "['bbox', 'AP', 38, 1]", "[['bbox', 'AP', '38', 1]]")
        ),
        (
            ["TEST.EXPECTED_RESULTS", "[['bbox', 'AP', 3, 1]]", "DATASETS.TEST", "()"],
            r"EXPECTED_RESULTS is of one data set, and DATASETS\.TEST has 0",
        ),
        (
            ["MODEL.DEVICE", "cpu", "MODEL.RESNETS.DEFORM_ON_PER_STAGE", "[False,True,True,True]"],
            r"DEFORM_ON_PER_STAGE .*: deformable convolution needs a GPU",
        ),
    ],
)
def test_options_that_do_not_go_together(train_net, data_options, tmp_path, options, expected):
    """They are refused with the names of the keys, before anything is done."""
    register, names = data_options
    output = tmp_path / "output"
    with pytest.raises(SystemExit, match=expected):
        train_net(*register, *names, *TINY, "OUTPUT_DIR", output, *options)
    assert not output.exists()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["MODEL.FPN.NORM", "XX"], r"The model .* of MODEL\.FPN\.NORM 'XX': KeyError: 'XX'"),
        (["MODEL.RESNETS.DEPTH", "19"], r"The model .* of MODEL\.RESNETS\.DEPTH 19: KeyError: 19"),
        (["MODEL.FPN.FUSE_TYPE", "XX"], r"MODEL\.FPN\.FUSE_TYPE 'XX': AssertionError: .*\"avg\""),
        (["MODEL.RETINANET.IN_FEATURES", "['p9']"], r"RETINANET\.IN_FEATURES \['p9'\]: KeyError"),
        (["TEST.DETECTIONS_PER_IMAGE", "0"], "of TEST.DETECTIONS_PER_IMAGE 0: ValueError"),
        (["SOLVER.LR_SCHEDULER_NAME", "XX"], r"schedule .* SOLVER\.LR_SCHEDULER_NAME 'XX': ValueE"),
        (
            ["SOLVER.NESTEROV", "True", "SOLVER.MOMENTUM", "0.0"],
            r"The optimiser .*SOLVER\.MOMENTUM",
        ),
        (["INPUT.MIN_SIZE_TRAIN_SAMPLING", "XX"], r"The loader .*MIN_SIZE_TRAIN_SAMPLING 'XX': A"),
        *(
            (
                ["TEST.EVAL_PERIOD", "1", "TEST.BEST_METRIC", x],
                f"{x} is not evaluated: it may be bb",
            )
            for x in ("bbox/mAP", "AP", "segm/AP", "bbox/AP-no class", "bbox_TTA/AP")
        ),
    ],
)
def test_values_that_nothing_is_built_of(train_net, data_options, tmp_path, options, expected):
    """They are refused before the training in one sentence that names the key."""
    register, names = data_options
    output = tmp_path / "output"
    with pytest.raises(SystemExit, match=expected):
        train_net(*register, *names, *TINY, "OUTPUT_DIR", output, *options)
    assert not [*output.glob("model*")]
    assert not (output / "metrics.json").exists()


def test_a_part_of_the_users_own_that_fails(cfg, monkeypatch):
    """Its error keeps the traceback, though it has a value of the config."""

    def build(cfg, shape):
        raise ValueError(f"my {cfg.MODEL.BACKBONE.NAME}")

    monkeypatch.setitem(BACKBONE_REGISTRY._obj_map, "mine", build)
    cfg.MODEL.BACKBONE.NAME = "mine"
    with pytest.raises(ValueError, match=r"^my mine$"):
        Trainer.build_model(cfg)


def test_best_only(train_net, data_options, tmp_path):
    """--resume where nothing else is left does not begin anew beside it."""
    register, names = data_options
    (tmp_path / "model_best.pth").write_bytes(b"weights")
    with pytest.raises(
        SystemExit, match=r"no checkpoint .*, only model_best\.pth: .*MODEL\.WEIGHTS"
    ):
        train_net("--resume", *register, *names, *TINY, "OUTPUT_DIR", tmp_path)


def test_ctrl_c_in_an_evaluation(train_net, data_options, run_folder, monkeypatch, tmp_path):
    """There is nothing to save: it ends with the status of a training that is stopped."""

    def evaluate(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("freeanchor.engine.Trainer.test", evaluate)
    register, names = data_options
    options = ["MODEL.WEIGHTS", run_folder / "model_final.pth", "OUTPUT_DIR", tmp_path / "output"]
    with pytest.raises(SystemExit) as status:
        train_net("--eval-only", *register, *names, *TINY, *options)
    assert status.value.code == 130


def test_eval_only_without_weights(train_net, data_options):
    """AP of a random model is not what was asked for."""
    register, names = data_options
    with pytest.raises(SystemExit, match=r"--eval-only needs MODEL\.WEIGHTS"):
        train_net("--eval-only", *register, *names)


def test_eval_only_of_a_run_that_is_not_there(train_net, data_options, tmp_path):
    """--resume in an empty folder does not evaluate a random model either."""
    register, names = data_options
    output = tmp_path / "output"
    with pytest.raises(SystemExit, match=f"--resume: there is no checkpoint in {output}"):
        train_net("--eval-only", "--resume", *register, *names, "OUTPUT_DIR", output)
    assert not output.exists()


def test_config_file_that_is_not_there(train_net):
    """The file is named."""
    with pytest.raises(SystemExit, match=r"there is no file 'nowhere\.yaml'"):
        train_net(config="nowhere.yaml")


def test_more_gpus_than_there_are(train_net, monkeypatch):
    """The number that was found is said."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(SystemExit, match="--num-gpus 8: this machine has 2"):
        train_net("--num-gpus", "8")


@pytest.mark.parametrize("options", [[], ["--dist-url", "auto"]])
def test_machines_that_would_not_meet(train_net, monkeypatch, options):
    """Each would wait for the others at an address of its own, for half an hour."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(SystemExit, match="--num-machines 2 needs --dist-url tcp://HOST:PORT"):
        train_net("--num-gpus", "2", "--num-machines", "2", *options)


@pytest.mark.parametrize("several", [False, True])
def test_everything_there_is_to_evaluate(train_net, data_options, tmp_path, several):
    """NMS recall, parts of AP and test-time augmentation, each beside the others."""
    register, names = data_options
    names = [*names[:3], "('val','train')"] if several else names
    options = [*names, *TINY, "TEST.NMS_RECALL", "True", "TEST.AUG.ENABLED", "True"]
    options += ["TEST.AUG.MIN_SIZES", "(64, 96)", "OUTPUT_DIR", tmp_path / "output"]
    train_net(*register, *options)
    (metrics,) = (
        x
        for x in read_metrics(tmp_path / "output" / "metrics.json")
        if "bbox/AP" in x or "val/bbox/AP" in x
    )
    # What TEST.BEST_METRIC may be is what there is.
    known = Trainer.metrics(read_config(tmp_path / "output" / "config.yaml"))
    evaluated = {x.removeprefix("train/") for x in metrics if "/" in x and "val/" not in x}
    others = ("calibration", "threshold", "freeanchor")
    assert set(known) == {x for x in evaluated if not x.startswith(others)}
    assert {"nms_recall/NR", "aspect_ratio/AP>5", "crowding/AR0", "bbox_TTA/AP"} <= set(known)
    for folder in ("inference", "inference_TTA"):
        path = tmp_path / "output" / folder / "val" / "coco_instances_results.json"
        assert json.loads(path.read_text())


@pytest.mark.parametrize("options", [[], ["MODEL.DEVICE", "cpu"]])
def test_config_of_a_machine_without_gpu(tmp_path, cfg, dataset, monkeypatch, options):
    """The CPU that its config names is not used beside a GPU without a word, unless it is given."""
    path = tmp_path / "config.yaml"
    cfg.MODEL.DEVICE, cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = "cpu", (dataset[0],), ()
    cfg.MODEL.RETINANET.NUM_CLASSES = 2
    path.write_text(cfg.dump())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    args = argument_parser().parse_args(["--config-file", str(path), *options])
    said = defaults._device_warning(build_config(args), args)
    assert bool(said) == (not options)
    assert not said or f"as {path} says" in said
