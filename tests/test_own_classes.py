"""A data set with classes of its own goes through every command by its folder alone, as docs/own_classes.md shows."""

import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest

import sisma_jax
from sisma_jax import cli
from sisma_jax.data import photos
from sisma_jax.data.classes import ClassSet
from tests.processes import ROOT

SIZE = 24


def face(seed: int) -> np.ndarray:
    """A mask of the classes in docs/own_classes.md: skin, hair, two eyes, and a border without a class."""
    rng = np.random.default_rng(seed)
    mask = np.zeros((SIZE, SIZE), np.uint8)
    top, left = rng.integers(3, 6, 2)
    mask[top - 2 : top + 14, left : left + 14] = 2
    mask[top + 3 : top + 16, left + 2 : left + 12] = 1
    mask[top + 6 : top + 8, left + 3 : left + 5] = 3  # the subject's right eye is on the viewer's left
    mask[top + 6 : top + 8, left + 9 : left + 11] = 4
    mask[:1] = 255
    return mask


@pytest.fixture(scope="module")
def document() -> str:
    return (ROOT / "docs/own_classes.md").read_text()


@pytest.fixture(scope="module")
def classes_json(document) -> str:
    (text,) = re.findall(r"```json\n(.*?)```", document, re.S)
    return text


@pytest.fixture(scope="module")
def folder(tmp_path_factory, classes_json) -> Path:
    """The raw folder, and beside it the file of the experiment."""
    top = tmp_path_factory.mktemp("own")
    (top / "faces/images").mkdir(parents=True)
    (top / "faces/labels").mkdir()
    (top / "faces/classes.json").write_text(classes_json)
    colors = np.uint8(ClassSet.from_json(json.loads(classes_json), "classes.json").colors)
    for seed in range(24):
        mask = face(seed)
        image = colors[np.where(mask == 255, 0, mask)]
        (top / f"faces/images/person {seed}_0.png").write_bytes(photos.encode_png(image))
        (top / f"faces/labels/person {seed}_0.png").write_bytes(photos.encode_png(mask))
    (top / "tiny.py").write_text(
        "import dataclasses\nfrom pathlib import Path\nfrom tests.tiny import tiny_config\n"
        "from sisma_jax.config import DataConfig\n\n\ndef get_config():\n"
        f"    data = DataConfig(name='celebamask_hq', root={str(top / 'faces')!r}, num_test=8, image_size=16,\n"
        f"        cache_dir={str(top / 'data')!r})\n"
        "    return dataclasses.replace(tiny_config(Path('data')), data=data)\n"
    )
    return top


def command(folder: Path, *arguments: object) -> None:
    config = ["--config", str(folder / "tiny.py"), "--workdir", str(folder / "run")]
    cli.main([*config, *map(str, arguments), "--data.classes", str(folder / "faces/classes.json")])


def test_own_classes_go_through_every_command(folder, capsys):
    command(folder, "prepare")
    assert "(16 train, 8 test examples)" in capsys.readouterr().out
    command(folder)  # trains the denoiser and the face parser, samples and evaluates
    report = json.loads((folder / "run/evaluation.json").read_text())
    assert list(report["mask_agreement"]["samples"]["iou_per_class"]) == [
        "background",
        "skin",
        "hair",
        "r_eye",
        "l_eye",
    ]
    mask = folder / "faces/labels/person 3_0.png"
    command(folder, "sample", "--mask", mask, "--num", 2, "--seed", 1, "--out", folder / "faces_of_3")
    assert (folder / "faces_of_3/person 3_0_1.png").exists()
    command(folder, "export", "--out", folder / "own.safetensors")
    pipe = sisma_jax.load(folder / "own.safetensors")
    assert pipe.config.data.classes.names == ("background", "skin", "hair", "r_eye", "l_eye")
    assert pipe.config.data.classes.ignored == 255
    faces = pipe(mask, key=jax.random.key(1), num_samples=2)
    for number in range(2):
        sampled = photos.read_image_file(folder / f"faces_of_3/person 3_0_{number}.png")
        np.testing.assert_array_equal(faces[number], sampled)
    assert set(np.unique(pipe.segment(photos.read_image_file(folder / "faces/images/person 3_0.png")))) <= set(range(5))
    with pytest.raises(sisma_jax.InputError, match=r"label 7 is outside 0..4 and not the ignored label 255"):
        pipe(np.full((16, 16), 7), key=jax.random.key(0))


def test_the_folders_classes_are_not_taken_for_the_default(folder, capsys):
    with pytest.raises(SystemExit):
        cli.main(["--config", str(folder / "tiny.py"), "prepare"])
    errors = capsys.readouterr().err
    assert "classes.json describes other classes than --data.classes, which is the default" in errors
    assert f"give --data.classes={folder / 'faces/classes.json'}" in errors


def test_the_document_names_the_commands_and_options_that_there_are(document):
    for option in re.findall(r"--([a-z]+)\.([a-z_]+)", document):
        assert ".".join(option) in sisma_jax.config_files.keys(), option
