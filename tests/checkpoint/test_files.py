"""Files from anywhere: nothing in them is run, and damage is an error that names the file."""

import collections
import io
import os
import pickle
import random
import sys
import types
import zipfile

import numpy as np
import pytest
import torch
from freeanchor.checkpoint import files, read_checkpoint, write_checkpoint
from freeanchor.errors import FileError
from safetensors.torch import save_file

TENSORS = {"a.weight": torch.randn(3, 2), "a.bias": torch.zeros(3, dtype=torch.int64)}


class Hostile:
    """Creates a folder when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        """What pickle calls when it reads this."""
        return os.mkdir, (self.path,)


def torch_file(content, zipped=True):
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


def torchscript_file():
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), buffer)
    return buffer.getvalue()


HOSTILE = {
    "zip.pth": torch_file,
    "legacy.pth": lambda content: torch_file(content, zipped=False),
    "zip.pt": torch_file,
    "zip.pyth": torch_file,
    "protocol2.pkl": lambda content: pickle.dumps(content, 2),
    "protocol5.pkl": lambda content: pickle.dumps(content, 5),
    "pickle.ckpt": torch_file,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_checkpoint(tmp_path, monkeypatch, name):
    """It is refused and not run. It is run by who says so, which shows that it was hostile."""
    canary, path = tmp_path / "canary", tmp_path / name
    path.write_bytes(HOSTILE[name]({"model": {"a": Hostile(canary)}}))
    with pytest.raises(FileError, match="FREEANCHOR_UNSAFE_LOAD=1") as error:
        read_checkpoint(str(path))
    assert str(path) in str(error.value)
    assert name.endswith(".ckpt") or "mkdir" in str(error.value)
    assert not canary.exists()
    monkeypatch.setenv("FREEANCHOR_UNSAFE_LOAD", "1")
    read_checkpoint(str(path))
    assert canary.is_dir()


def test_old_pytorch(tmp_path, monkeypatch, caplog):
    """Before 2.6, weights_only can be made to run code, and before 2.10 to corrupt memory."""
    path = tmp_path / "a.pth"
    path.write_bytes(torch_file({"model": TENSORS}))
    monkeypatch.setattr(torch, "__version__", "2.5.1+cu121")
    with pytest.raises(FileError, match=r"a\.pth is not read: .* 2\.6 or newer"):
        read_checkpoint(str(path))
    for version in ("2.9.1", "2.10.0"):
        monkeypatch.setattr(torch, "__version__", version)
        assert read_checkpoint(str(path))["model"].keys() == TENSORS.keys()
    assert "PyTorch 2.9.1 (CVE-2026-24747)" in caplog.text
    assert "2.10.0" not in caplog.text


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning", "ignore:'torch.load'")
def test_torchscript_is_no_checkpoint(tmp_path):
    """A program in a .pth is refused as one."""
    path = tmp_path / "model.pth"
    path.write_bytes(torchscript_file())
    with pytest.raises(FileError, match=r"model\.pth holds TorchScript"):
        read_checkpoint(str(path))


def test_safetensors_named_pth(tmp_path):
    """A suffix that does not fit says so, and nothing is guessed."""
    path = tmp_path / "a.safetensors"
    write_checkpoint(path, TENSORS, {})
    path.rename(tmp_path / "a.pkl")
    with pytest.raises(FileError, match=r"a\.pkl .* of another type than its name says"):
        read_checkpoint(str(tmp_path / "a.pkl"))


@pytest.mark.parametrize(
    "array",
    [np.array([os.getcwd]), np.array([{}], dtype=object), np.zeros(2, "U3"), np.zeros(2, "i4,f4")],
    ids=["function", "object", "text", "record"],
)
def test_arrays_of_anything_but_numbers(tmp_path, array):
    """Arrays of objects are a way to hide them; text and records have no place in a model."""
    path = tmp_path / "a.pkl"
    path.write_bytes(pickle.dumps({"model": {"a": array}}))
    with pytest.raises(FileError, match=r"a\.pkl holds"):
        read_checkpoint(str(path))


def crafted_array(shape, content):
    """A pickle whose array claims to be larger than its content."""

    class Crafted:
        def __reduce__(self):
            state = (1, shape, np.dtype("f4"), False, content)
            return np.core_reconstruct, (np.ndarray, (0,), b"b"), state

    return Crafted()


@pytest.mark.parametrize("shape", [(1000,), (-1, 7), (2**40, 2**40), "x"])
def test_array_that_claims_to_be_larger_than_it_is(tmp_path, monkeypatch, shape):
    """Its shape is checked against its content, before it is believed."""
    function = np.zeros(1).__reduce__()[0]
    monkeypatch.setattr(np, "core_reconstruct", function, raising=False)
    path = tmp_path / "a.pkl"
    path.write_bytes(pickle.dumps({"model": {"a": crafted_array(shape, b"\0" * 8)}}, 2))
    with pytest.raises(FileError, match=r"a\.pkl is damaged"):
        read_checkpoint(str(path))


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("numpy_name", [b"numpy._core", b"numpy.core"])
def test_pickles_of_arrays(tmp_path, protocol, numpy_name):
    """What Detectron2's zoo has: arrays of all types and layouts, by NumPy 1 and 2."""
    arrays = {
        "float": np.arange(6, dtype=np.float32).reshape(2, 3),
        "half": np.ones((2, 2), np.float16),
        "columns": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "int": np.arange(3),
        "bool": np.array([True, False]),
        "none": np.zeros((0, 4), np.float32),
        "zero-dimensional": np.array(2.5),
        "swapped": np.arange(3, dtype=">f4"),
        "scalar": np.float32(1.5),
    }
    ordered = collections.OrderedDict(arrays)
    content = {"model": ordered, "__author__": "me", "more": [1, (2.5, None), b"raw", True]}
    data = pickle.dumps(content, protocol)
    if protocol < 4:
        data = data.replace(b"numpy._core", numpy_name).replace(b"numpy.core", numpy_name)
    path = tmp_path / "a.pkl"
    path.write_bytes(data)
    loaded = read_checkpoint(str(path))
    assert list(loaded["model"]) == list(arrays)
    for name, array in arrays.items():
        found = loaded["model"][name]
        np.testing.assert_array_equal(found, array, strict=name != "swapped")
        assert torch.as_tensor(found).shape == array.shape
    assert loaded["more"] == content["more"]
    assert loaded["__author__"] == "me"


class Python2Pickler(pickle._Pickler):
    """Writes bytes as the text of Python 2."""

    def save_bytes(self, value):
        self.write(pickle.SHORT_BINSTRING + bytes([len(value)]) + value)

    dispatch = {**pickle._Pickler.dispatch, bytes: save_bytes}  # noqa: RUF012


def test_pickles_of_python_2(tmp_path):
    """Caffe2's."""
    values = np.array([1.0, -300.5], np.float32)
    path = tmp_path / "R-50.pkl"
    with open(path, "wb") as f:
        Python2Pickler(f, 2).dump({"blobs": {"conv1_w": values}})
    np.testing.assert_array_equal(read_checkpoint(str(path))["blobs"]["conv1_w"], values)


class HistoryBuffer:
    """As MMEngine's, which is pickled with references to its methods."""

    @classmethod
    def min(cls):
        raise AssertionError("run by reading a checkpoint")


def test_checkpoint_of_mmengine(tmp_path, monkeypatch):
    """MMDetection's own checkpoints keep logs and NumPy arrays beside the weights."""
    module = types.ModuleType("mmengine.logging.history_buffer")
    module.HistoryBuffer = HistoryBuffer
    monkeypatch.setattr(HistoryBuffer, "__module__", module.__name__)
    for name in ("mmengine", "mmengine.logging"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    log = module.HistoryBuffer()
    log._methods = {"min": HistoryBuffer.min}
    log._log_history, log._count_history = np.arange(3.0), np.ones(3, dtype=np.int64)
    content = {
        "state_dict": TENSORS,
        "message_hub": {"log_scalars": {"loss": log}, "runtime": np.float64(1)},
    }
    path = tmp_path / "epoch_12.pth"
    path.write_bytes(torch_file(content))
    for name in ("mmengine", "mmengine.logging", module.__name__):
        monkeypatch.delitem(sys.modules, name)
    assert torch.equal(read_checkpoint(str(path))["state_dict"]["a.weight"], TENSORS["a.weight"])


@pytest.fixture(scope="module")
def contents(tmp_path_factory):
    """A small whole file of each format."""
    path = tmp_path_factory.mktemp("whole") / "a.safetensors"
    write_checkpoint(path, TENSORS, {"key": 1})
    return {
        "a.pth": torch_file({"model": TENSORS}),
        "legacy.pth": torch_file({"model": TENSORS}, zipped=False),
        "a.pkl": pickle.dumps({"model": {k: v.numpy() for k, v in TENSORS.items()}}, 2),
        "a.safetensors": path.read_bytes(),
    }


@pytest.mark.parametrize("name", ["a.pth", "legacy.pth", "a.pkl", "a.safetensors"])
def test_cut_off_files(tmp_path, contents, name):
    """Wherever a download stopped, the message names the file."""
    path, content = tmp_path / name, contents[name]
    for length in [*range(0, len(content) - 1, 1 + len(content) // 40), len(content) - 1]:
        path.write_bytes(content[:length])
        # A cut-off name of a class in a legacy file is a name that is not known.
        with pytest.raises(FileError, match=rf"{name} (is damaged, cut off|holds \w*\.)"):
            read_checkpoint(str(path))


@pytest.mark.parametrize("name", ["a.pth", "legacy.pth", "a.pkl", "a.safetensors"])
def test_files_with_wrong_bytes(tmp_path, contents, name):
    """Damage ends in an error of ours or in values, never in any other error."""
    path, rng = tmp_path / name, random.Random(0)
    failures = 0
    for _ in range(150):
        content = bytearray(contents[name])
        for _ in range(3):
            content[rng.randrange(len(content))] = rng.randrange(256)
        path.write_bytes(content)
        try:
            read_checkpoint(str(path))
        except FileError as error:
            assert name in str(error)  # noqa: PT017  # not all of them fail
            failures += 1
    assert failures > 10


def test_what_is_no_dictionary(tmp_path):
    """A single tensor is a file, but no checkpoint."""
    path = tmp_path / "a.pth"
    path.write_bytes(torch_file(torch.zeros(3)))
    with pytest.raises(FileError, match=r"a\.pth holds one Tensor"):
        read_checkpoint(str(path))


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_round_trip(tmp_path, suffix):
    """All values, types and the config come back, from views and shared memory too."""
    table = torch.arange(12.0).reshape(3, 4)
    model = {"a": table, "b": table.T, "c": table[1:, ::2], "d": torch.ones(2, dtype=torch.half)}
    config = {"MODEL.PIXEL_MEAN": [1.5, 2.0], "INPUT.FORMAT": "RGB"}
    path = tmp_path / "new folder" / f"a{suffix}"
    write_checkpoint(path, model, config)
    loaded = read_checkpoint(str(path))
    assert loaded[files.CONFIG_KEY] == config
    assert loaded["model"].keys() == model.keys()
    for name, tensor in model.items():
        assert loaded["model"][name].dtype == tensor.dtype
        assert torch.equal(loaded["model"][name], tensor)
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_writing_keeps_the_old_file_until_the_new_one_is_whole(tmp_path, monkeypatch):
    """A full disk does not cost the checkpoint that was there."""

    def full(*_):
        raise OSError(28, "No space left on device")

    path = tmp_path / "a.pth"
    write_checkpoint(path, TENSORS, {})
    before = path.read_bytes()
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(FileError, match=r"a\.pth cannot be written: .*No space left"):
        write_checkpoint(path, {}, {})
    assert path.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("name", ["file/a.pth", "file/folder/a.pth", "file/a.safetensors"])
def test_writing_below_a_file(name, tmp_path):
    """What is in the way is named, whatever the system calls it."""
    (tmp_path / "file").write_text("")
    with pytest.raises(FileError, match=f"folder to write to: {tmp_path}/file is a file"):
        write_checkpoint(tmp_path / name, TENSORS, {})


def test_writing_another_suffix(tmp_path):
    """The two that there are, are named."""
    with pytest.raises(FileError, match=r"written as \.pth or \.safetensors"):
        write_checkpoint(tmp_path / "a.pkl", TENSORS, {})


def test_config_in_safetensors_that_is_no_json(tmp_path):
    """The header is data too, and may be wrong."""
    path = tmp_path / "a.safetensors"
    save_file(TENSORS, path, {files.CONFIG_KEY: "{"})
    with pytest.raises(FileError, match=r"a\.safetensors is damaged"):
        read_checkpoint(str(path))


def test_checkpoint_that_unpacks_to_much_more(tmp_path, monkeypatch):
    """A compressed zip, and a tensor that repeats one element: refused before memory is taken."""
    plain, bomb = tmp_path / "plain.pth", tmp_path / "bomb.pth"
    torch.save({"model": {"a": torch.zeros(2**24)}}, plain)
    with zipfile.ZipFile(plain) as source, zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as out:
        for name in source.namelist():
            out.writestr(name, source.read(name))
    expanded = tmp_path / "expanded.pth"
    torch.save({"model": {"a": torch.zeros(1).expand(2**12, 2**12)}}, expanded)
    assert max(bomb.stat().st_size, expanded.stat().st_size) < 2**20
    for path in (bomb, expanded):
        with pytest.raises(FileError, match=rf"{path.name} would take 64 MiB of memory"):
            read_checkpoint(str(path))
    assert read_checkpoint(str(plain))["model"]["a"].numel() == 2**24
    monkeypatch.setenv("FREEANCHOR_UNSAFE_LOAD", "1")
    assert read_checkpoint(str(expanded))["model"]["a"].numel() == 2**24


def test_pickle_that_nests_without_end(tmp_path):
    """2^64 lists of a few hundred bytes, each there once, are read in no time."""
    value = [1.0]
    for _ in range(64):
        value = [value, value]
    (tmp_path / "nested.pkl").write_bytes(pickle.dumps({"model": {"a": value}}, 2))
    assert len(read_checkpoint(str(tmp_path / "nested.pkl"))["model"]["a"]) == 2


@pytest.mark.parametrize("config", ["[1]", "3", "null"])
def test_config_in_safetensors_that_is_no_dictionary(tmp_path, config):
    """It is damage, not an AttributeError later."""
    save_file(TENSORS, tmp_path / "a.safetensors", {files.CONFIG_KEY: config})
    with pytest.raises(FileError, match=r"a\.safetensors is damaged"):
        read_checkpoint(str(tmp_path / "a.safetensors"))
