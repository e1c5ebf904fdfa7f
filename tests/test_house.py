"""The package as a whole: its floors, its public names, its command line."""

import argparse
import ast
import importlib
import re
import subprocess
import sys

import freeanchor
import pytest
from conftest import REPOSITORY
from freeanchor.__main__ import _COMMANDS, main
from freeanchor.config import new_config

PACKAGE = REPOSITORY / "projects" / "FreeAnchor" / "freeanchor"
# From the ground up. What is on one floor does not import each other.
FLOORS = (
    ("errors", "compat", "openmp", "paths"),
    ("command_line", "config", "layers"),
    ("modeling", "values"),
    ("checkpoint", "evaluation"),
    ("data", "model_zoo"),
    ("visualization",),
    ("engine", "deploy"),
    ("model_commands",),
    ("__main__", "__init__"),
)
ROOMS = sorted(p.name for p in PACKAGE.iterdir() if (p / "__init__.py").is_file())


def imports(path):
    """The modules of the package that a file imports, anywhere in it, by their full names."""
    package = ["freeanchor", *path.relative_to(PACKAGE).parent.parts]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            module = [*start, *(node.module or "").split(".")] if node.module else start
            if module[:1] == ["freeanchor"]:
                for alias in node.names:
                    yield (*module[1:], alias.name)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "freeanchor":
                    yield tuple(alias.name.split(".")[1:])


def test_no_import_runs_up():
    """Not between rooms, and lazy imports count too."""
    floor = {name: i for i, names in enumerate(FLOORS) for name in names}
    for path in PACKAGE.rglob("*.py"):
        room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        for target in imports(path):
            if target and target[0] != room:
                assert target[0] in floor, f"{path} imports from a room without a floor: {target}"
                assert floor[target[0]] < floor[room], f"{path} imports {'.'.join(target)}"


def test_no_circle_within_a_room():
    """Each module of a room comes after those that it imports."""
    for room in ROOMS:
        modules = {p.stem for p in (PACKAGE / room).glob("*.py")} - {"__init__"}
        needs = {
            m: {t[1] for t in imports(PACKAGE / room / f"{m}.py") if t[0] == room and len(t) > 1}
            & modules
            for m in modules
        }
        while free := [m for m, others in needs.items() if not others & needs.keys()]:
            for m in free:
                del needs[m]
        assert not needs, f"{room}: a circle among {sorted(needs)}"


@pytest.mark.parametrize("room", ROOMS)
def test_public_names(room):
    """A room hands on what it imports, in order, and no more."""
    module = importlib.import_module(f"freeanchor.{room}")
    tree = ast.parse((PACKAGE / room / "__init__.py").read_text())
    given = {
        alias.name
        for node in tree.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if node.module is not None
    }
    assert set(module.__all__) == given
    assert all(hasattr(module, name) for name in module.__all__)


def test_names_in_the_documents():
    """Every `freeanchor.x.y` in README and docs can be imported."""
    for path in (REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))):
        text = path.read_text()
        for name in set(re.findall(r"`(freeanchor(?:\.[a-zA-Z_]+)+)[`(]", text)):
            *parents, last = name.split(".")
            try:
                found = hasattr(importlib.import_module(".".join(parents)), last)
                found = found or importlib.util.find_spec(name) is not None
            except ModuleNotFoundError:
                found = False
            assert found, f"{path.name} names {name}"
        for room, names in re.findall(r"from freeanchor\.?([\w.]*) import ([\w, ]+)", text):
            module = importlib.import_module(f"freeanchor.{room}".rstrip("."))
            for name in names.split(", "):
                try:
                    known = hasattr(module, name) or importlib.import_module(
                        f"{module.__name__}.{name}"
                    )
                except ModuleNotFoundError:
                    known = False
                assert known, f"{path.name} imports {name} from {module.__name__}"


def test_keys_and_configs_of_the_documents():
    """Every key and every config that README and docs name is there."""
    cfg = new_config()
    for path in (REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))):
        text = path.read_text()
        parts = "MODEL|INPUT|DATASETS|DATALOADER|SOLVER|TEST"
        for key in set(re.findall(rf"\b((?:{parts})(?:\.[A-Z0-9_]+)+)\b", text)):
            node = cfg
            for name in key.split("."):
                assert name in node, f"{path.name} names {key}"
                node = node[name]
        for config in set(re.findall(r"\bconfigs/[\w/-]+\.(?:yaml|py)", text)):
            assert (REPOSITORY / config).is_file(), f"{path.name} names {config}"


def test_every_key_is_described():
    """In config.py, to which README sends for them: a comment stands before each."""
    source = (PACKAGE / "config.py").read_text().splitlines()
    keys = [i for i, line in enumerate(source) if re.match(r" +cfg(\.[A-Z0-9_]+)+ = ", line)]
    assert len(keys) > 30
    for i in keys:
        above = i - 1
        while source[above].strip().startswith(("if ", "cfg.MODEL.")):
            assert source[above].endswith(("CfgNode()", ":")), source[i]
            above -= 1
        assert source[above].strip().startswith("#") or source[i].endswith("CfgNode()"), source[i]


def test_links_of_the_documents():
    """Files and headings that README, CONTRIBUTING and docs link to are there."""
    for path in (*REPOSITORY.glob("*.md"), *(REPOSITORY / "docs").glob("*.md")):
        for link in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
            if "://" in link:
                continue
            name, _, heading = link.partition("#")
            target = path.parent / name if name else path
            assert target.exists(), f"{path.name} links to {link}"
            if heading:
                headings = re.findall(r"^#+ (.*)", target.read_text(), re.MULTILINE)
                anchors = {re.sub(r"[^\w -]", "", x).lower().replace(" ", "-") for x in headings}
                assert heading in anchors, f"{path.name} links to {link}"


def test_top_level_names():
    """What every script of a user needs."""
    assert freeanchor.__all__ == ["FreeAnchor", "add_freeanchor_config"]
    assert all(hasattr(freeanchor, name) for name in freeanchor.__all__)


def test_help_lists_the_commands(capsys):
    """Each has a line of its own, and a --help."""
    with pytest.raises(SystemExit):
        main(["--help"])
    commands = re.findall(r"^    (\w+)", capsys.readouterr().out, re.MULTILINE)
    assert {"visualize", "report", "convert", "export", "predict", "shapes"} <= set(commands)
    for command in commands:
        with pytest.raises(SystemExit) as status:
            main([command, "--help"])
        assert status.value.code == 0
        assert f"usage: freeanchor {command}" in capsys.readouterr().out


def test_help_says_the_defaults():
    """Of every option that has one."""
    for command, (_, add_arguments, _) in _COMMANDS.items():
        parser = argparse.ArgumentParser(add_help=False)
        add_arguments(parser)
        for action in parser._actions:
            if action.default not in (None, False, "", []):
                assert "(default: " in (action.help or ""), (command, action.dest)


def test_help_imports_nothing_heavy(tmp_path):
    """Neither PyTorch nor Detectron2, which take seconds."""
    (tmp_path / "freeanchor").write_text(
        "import sys\nfrom freeanchor.__main__ import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "assert 'freeanchor.command_line' in sys.modules\n"
        "assert not {'torch', 'detectron2', 'numpy'} & sys.modules.keys()"
    )
    command = [sys.executable, str(tmp_path / "freeanchor"), "--help"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def test_processes_of_the_command_line(tmp_path):
    """Those that a command starts can import the package, though they have its arguments."""
    (tmp_path / "freeanchor").write_text(
        "from concurrent.futures import ProcessPoolExecutor\n"
        "from multiprocessing import get_context\n"
        "from freeanchor.__main__ import main\n"
        "if __name__ == '__main__':\n"
        "    with ProcessPoolExecutor(1, get_context('spawn')) as pool:\n"
        "        pool.submit(exec, 'import freeanchor.engine').result()\n"
    )
    subprocess.run([sys.executable, str(tmp_path / "freeanchor"), "check"], check=True)


@pytest.mark.parametrize(
    "how",
    [
        *(["-m", "freeanchor"], ["-um", "freeanchor"], ["-mfreeanchor"]),
        ["-c", "from freeanchor.__main__ import main; main()"],
    ],
    ids=" ".join,
)
def test_errors_of_commands(how, tmp_path):
    """One sentence and exit status 1, however the command line is started."""
    done = subprocess.run(
        [sys.executable, *how, "convert", "nowhere.pth", "out.pth"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.strip() == "freeanchor convert: There is no file nowhere.pth"


@pytest.mark.parametrize(
    ("command", "wrong", "expected"),
    [
        (["serve", "run"], ["--max-megabytes", "nan"], "at least 0, got nan"),
        (["serve", "run"], ["--rate", "inf"], "at least 0, got inf"),
        (["report", "run"], ["--num-images", "-1"], "at least 0, got -1"),
        (["report", "run"], ["--score-thresh", "nan"], "in 0 to 1, got nan"),
        (["visualize", "run"], ["--score-thresh", "7"], "in 0 to 1, got 7"),
        (["shapes", "out"], ["--seed", "-1"], "at least 0, got -1"),
        (["shapes", "out"], ["--num-train", "x"], "invalid int value: 'x'"),
        (["predict", "run", "a.jpg"], ["--batch-size", "0"], "at least 1, got 0"),
    ],
)
def test_numbers_of_options(command, wrong, expected, capsys):
    """What no number of it can be is refused by name, and nan is none."""
    with pytest.raises(SystemExit) as error:
        main([*command, *wrong])
    assert error.value.code == 2
    assert f"argument {wrong[0]}: " in (said := capsys.readouterr().err)
    assert said.rstrip().endswith(expected)


@pytest.mark.parametrize("folder", ["file", "file/folder"])
@pytest.mark.parametrize(
    "command",
    [
        ["convert", "nowhere.pth", "{}/out.pth"],
        ["export", "nowhere", "{}/out.onnx"],
        ["predict", "nowhere", "nothing.jpg", "--out", "{}"],
        ["shapes", "{}"],
    ],
    ids=lambda command: command[0],
)
def test_output_below_a_file(command, folder, tmp_path, monkeypatch):
    """It is refused before anything is read or made."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    expected = f"freeanchor {command[0]}: {folder} cannot be a folder to write to: file is a file"
    with pytest.raises(SystemExit, match=f"^{expected}$"):
        main([x.format(folder) for x in command])


def test_wrong_options(tmp_path, cfg, coco):
    """A key that there is not is named, and a value without a key."""
    for file, text in (("config.yaml", cfg.dump()), ("metrics.json", "")):
        (tmp_path / file).write_text(text)
    with pytest.raises(SystemExit, match=r"freeanchor report: MODEL\.NO_KEY 1: .*NO_KEY"):
        main(["report", str(tmp_path), "--opts", "MODEL.NO_KEY", "1"])
