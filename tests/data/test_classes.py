import dataclasses
import json

import numpy as np
import pytest

from sisma_jax.data.classes import CELEBAMASK_HQ, ClassSet
from sisma_jax.errors import InputError
from tests.data.raw_layout import random_mask

FOUR = {
    "title": "Four",
    "names": ["none", "left", "right", "rest"],
    "colors": [[0, 0, 0], [255, 0, 0], [0, 255, 0], [0, 0, 255]],
    "mirrored": [["left", "right"]],
    "ignored": 255,
}


def four(**changes) -> ClassSet:
    return ClassSet.from_json(FOUR | changes, "four.json")


def test_celebamask_hq_has_19_classes_with_a_colour_each():
    assert len(CELEBAMASK_HQ) == len(set(CELEBAMASK_HQ.names)) == 19
    assert len(set(CELEBAMASK_HQ.colors)) == 19
    assert [CELEBAMASK_HQ.index[name] for name in CELEBAMASK_HQ.names] == list(range(19))
    assert CELEBAMASK_HQ.ignored is None


def test_flip_mirrors_and_exchanges_left_and_right():
    names = ["l_eye", "r_eye", "l_brow", "r_brow", "l_ear", "r_ear", "nose", "ear_r"]
    mirrored = ["ear_r", "nose", "l_ear", "r_ear", "l_brow", "r_brow", "l_eye", "r_eye"]
    mask = np.array([[CELEBAMASK_HQ.index[name] for name in names]], np.uint8)
    assert [CELEBAMASK_HQ.names[index] for index in CELEBAMASK_HQ.flip(mask)[0]] == mirrored


def test_flip_is_an_involution():
    mask = random_mask(0, 33)
    flipped = CELEBAMASK_HQ.flip(mask)
    assert flipped.dtype == np.uint8
    assert (flipped != mask).any()
    np.testing.assert_array_equal(CELEBAMASK_HQ.flip(flipped), mask)


def test_flip_takes_a_batch():
    masks = np.stack([random_mask(0, 8), random_mask(1, 8)])
    np.testing.assert_array_equal(CELEBAMASK_HQ.flip(masks)[1], CELEBAMASK_HQ.flip(masks[1]))


def test_colorize_gives_each_class_its_colour():
    mask = np.arange(19, dtype=np.uint8).reshape(1, -1)
    colors = CELEBAMASK_HQ.colorize(mask)
    assert colors.dtype == np.uint8
    np.testing.assert_array_equal(colors[0], CELEBAMASK_HQ.colors)


def test_check_returns_uint8_and_keeps_values():
    mask = np.arange(19, dtype=np.int64)[None]
    checked = CELEBAMASK_HQ.check(mask, "m.png")
    assert checked.dtype == np.uint8
    np.testing.assert_array_equal(checked, mask)


@pytest.mark.parametrize("bad", [19, 255, -1])
def test_check_names_the_file_and_the_label(bad):
    with pytest.raises(
        InputError, match=f"m.png: label {bad} is outside 0..18; .*CelebAMask-HQ .0 background ... 18 c"
    ):
        CELEBAMASK_HQ.check(np.array([[0, bad]]), "m.png")


def test_check_refuses_floats():
    with pytest.raises(InputError, match=r"m.png: .*float32"):
        CELEBAMASK_HQ.check(np.zeros((2, 2), np.float32), "m.png")


def test_the_ignored_label_is_a_label_that_is_no_class():
    classes, mask = four(), np.array([[0, 1, 2, 3, 255]], np.uint8)
    np.testing.assert_array_equal(classes.check(mask.astype(np.int32), "m.png"), mask)
    np.testing.assert_array_equal(classes.flip(mask), [[255, 3, 1, 2, 0]])
    np.testing.assert_array_equal(classes.colorize(mask)[0, :4], classes.colors)
    assert tuple(classes.colorize(mask)[0, 4]) not in classes.colors
    assert len(classes) == 4
    with pytest.raises(InputError, match=r"m.png: label 4, 254 is outside 0..3 and not the ignored label 255; .*Four"):
        classes.check(np.array([[4, 254, 255]]), "m.png")


def test_equal_values_are_equal_and_hash_alike():
    assert four() == four()
    assert hash(four()) == hash(four())
    assert four() != four(ignored=None)
    assert len({four(), four(), CELEBAMASK_HQ}) == 2


def test_the_fingerprint_tells_what_labels_mean():
    same = [four(), four(title="Other"), four(colors=FOUR["colors"][::-1])]
    others = [four(ignored=254), four(mirrored=[]), four(names=["none", "right", "left", "rest"]), CELEBAMASK_HQ]
    assert len({classes.fingerprint for classes in same}) == 1
    assert len({classes.fingerprint for classes in [four(), *others]}) == 5


@pytest.mark.parametrize("classes", [four(), CELEBAMASK_HQ], ids=["four", "celebamask_hq"])
def test_json_round_trip(classes):
    values = json.loads(json.dumps(dataclasses.asdict(classes)))
    assert ClassSet.from_json(values, "x") == classes


def test_a_class_set_is_loaded_by_name_and_from_a_file(tmp_path, monkeypatch):
    assert ClassSet.load("celebamask_hq") == CELEBAMASK_HQ
    path = tmp_path / "four.json"
    path.write_text(json.dumps(FOUR))
    assert ClassSet.load(path) == ClassSet.load(str(path)) == four()
    monkeypatch.setenv("HOME", str(tmp_path))
    assert ClassSet.load("~/four.json") == four()
    path.write_text(json.dumps({key: FOUR[key] for key in ("title", "names", "colors")}))
    assert ClassSet.load(path) == four(mirrored=[], ignored=None)


def test_files_that_hold_no_class_set_are_named(tmp_path):
    with pytest.raises(InputError, match="classes helen: there is no such file; known by name: celebamask_hq"):
        ClassSet.load("helen")
    path = tmp_path / "classes.json"
    for content in (b"{", b"", b"\xff\xfe"):
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"classes .*classes\.json cannot be read as JSON"):
            ClassSet.load(path)
    with pytest.raises(InputError, match="cannot be read as JSON"):
        ClassSet.load(tmp_path)
    for values in ([], {"title": "x"}, FOUR | {"colours": []}, "x", None):
        path.write_text(json.dumps(values))
        with pytest.raises(InputError, match=r"classes\.json: a class set is a JSON object with title, names, colors"):
            ClassSet.load(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"title": ""}, "title must be a name"),
        ({"title": 3}, "title must be a name"),
        ({"names": "four"}, "names must be a list"),
        ({"names": ["a", "b", "", "d"]}, "names must be non-empty strings"),
        ({"names": ["a", "b", 3, "d"]}, "names must be non-empty strings"),
        ({"names": ["a", "b", {}, "d"]}, "names must be non-empty strings"),
        ({"names": ["a"], "colors": [[0, 0, 0]], "mirrored": []}, "between 2 and 255 classes are possible, got 1"),
        ({"names": [str(i) for i in range(256)]}, "between 2 and 255 classes are possible, got 256"),
        ({"names": ["none", "left", "right", "left"]}, "names must be distinct"),
        ({"colors": None}, "colors must be a list"),
        ({"colors": [[0, 0, 0]] * 3}, "there are 3 colors for 4 names"),
        ({"colors": [[0, 0, 0]] * 4}, "colors must be distinct"),
        *(
            ({"colors": [color, *FOUR["colors"][1:]]}, "a color must be three whole numbers in 0..255")
            for color in ([0, 0], [0, 0, 256], [0, 0, -1], [0, 0, 0.5], [0, 0, True], "red", 0, {})
        ),
        ({"mirrored": {}}, "mirrored must be a list"),
        *(
            ({"mirrored": [pair]}, "mirrored must hold pairs of names")
            for pair in (1, "ab", ["left"], ["left", "right", "rest"], {"left": 1, "right": 2})
        ),
        ({"mirrored": [["left", "middle"]]}, "mirrored must hold names of classes"),
        ({"mirrored": [["left", 2]]}, "mirrored must hold names of classes"),
        ({"mirrored": [["left", {}]]}, "mirrored must hold names of classes"),
        ({"mirrored": [["left", "right"], ["right", "rest"]]}, "a class can be mirrored into one other class only"),
        ({"mirrored": [["left", "left"]]}, "a class can be mirrored into one other class only"),
        *(
            ({"ignored": label}, "ignored must be null or a label in 4..255")
            for label in (0, 3, 256, -1, True, "255", 255.0)
        ),
    ],
)
def test_values_that_contradict_one_another_are_refused(changes, message):
    with pytest.raises(InputError, match=rf"^four\.json: .*{message}"):
        four(**changes)
