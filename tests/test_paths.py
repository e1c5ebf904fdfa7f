"""Names as parts of a path."""

from freeanchor.paths import file_stem
from hypothesis import given
from hypothesis import strategies as st


def test_usual_names_stay():
    """What people call their data is what they find on the disk."""
    for name in ("coco_2017_val", "my data", "細胞", "a.b-c_d$"):
        assert file_stem(name) == name
    assert file_stem(17) == "17"


def test_hostile_names(tmp_path):
    """None leads out of its folder, and no two are one file."""
    names = [
        "..",
        ".",
        "",
        "../x",
        "/etc/x",
        "a/b",
        "a%2Fb",
        "a\\b",
        "x" * 400,
        "x" * 401,
        "é" * 200,
    ]
    names += ["\ud800", "a\x00b", "CON:", "-rf", "~root", "a ", "a."]
    stems = [file_stem(name) for name in names]
    assert len(set(stems)) == len(names)
    for stem in stems:
        path = tmp_path / stem
        assert path.resolve().parent == tmp_path
        path.mkdir()


@given(st.text(), st.text())
def test_one_to_one(a, b):
    """Different names are different files, of one part of at most 255 bytes."""
    assert (file_stem(a) == file_stem(b)) == (a == b)
    stem = file_stem(a)
    assert stem not in ("", ".", "..")
    assert not set("/\\\0") & set(stem)
    assert len(stem.encode()) <= 200
