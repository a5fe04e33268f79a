"""Masks as people have them, through the command line and Python: read right, refused, or reported, never misread."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

import sisma_jax
from sisma_jax import cli
from sisma_jax.data import photos
from sisma_jax.data.classes import CELEBAMASK_HQ, ClassSet
from sisma_jax.data.drawing import draw_face
from sisma_jax.data.location_prior import LocationPrior
from sisma_jax.models.factory import init_params
from sisma_jax.runs.export import export_params
from tests.data.test_location_prior import in_order_of
from tests.tiny import tiny_config

FACE = draw_face((1, 3), 64)[1]


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """An exported file of an untrained model, with the prior of drawn faces."""
    config = tiny_config(Path("data"))
    prior = LocationPrior.fit([draw_face((0, i), 64)[1] for i in range(100)], CELEBAMASK_HQ)
    path = tmp_path_factory.mktemp("weights") / "faces.safetensors"
    export_params(path, config, 4, init_params(config, jax.random.key(0)), mask_prior=prior)
    return path


@pytest.fixture(scope="module")
def pipe(weights):
    return sisma_jax.load(weights)


def sample(weights: Path, *arguments: object) -> None:
    cli.main(["sample", "--weights", str(weights), "--num", "1", *map(str, arguments)])


def refused(capsys, weights: Path, *arguments: object) -> str:
    with pytest.raises(SystemExit) as exit_info:
        sample(weights, *arguments)
    assert exit_info.value.code == 2
    return capsys.readouterr().err


def face_of(folder: Path) -> np.ndarray:
    (file,) = folder.glob("*_0.png")
    return photos.read_image_file(file)


def test_the_prior_comes_with_the_file(pipe):
    assert pipe.mask_prior is not None
    assert pipe.mask_prior.log_probabilities.shape == (19, 32, 32)


def test_a_mask_in_another_order_is_refused_with_its_name_and_read_right_by_it(capsys, weights, tmp_path):
    plain, other = tmp_path / "plain.png", tmp_path / "other.png"
    plain.write_bytes(photos.encode_png(FACE))
    other.write_bytes(photos.encode_png(in_order_of(FACE, ClassSet.load("face_parsing_pytorch"))))
    message = refused(capsys, weights, "--mask", other, "--out", tmp_path / "none")
    assert "other.png: its classes lie where those of face-parsing.PyTorch would" in message
    assert "--mask_classes" in message
    assert not (tmp_path / "none").exists()
    sample(weights, "--mask", plain, "--out", tmp_path / "a")
    sample(weights, "--mask", other, "--mask_classes", "face_parsing_pytorch", "--out", tmp_path / "b")
    np.testing.assert_array_equal(face_of(tmp_path / "a"), face_of(tmp_path / "b"))
    assert "known by name" in refused(capsys, weights, "--mask", plain, "--mask_classes", "nonsense")


def test_the_same_from_python(pipe):
    other = in_order_of(FACE, ClassSet.load("face_parsing_pytorch"))
    with pytest.raises(sisma_jax.InputError, match=r"mask\[1\]: its classes lie where those of face-parsing"):
        pipe([FACE, other], key=jax.random.key(0))
    expected = pipe(FACE, key=jax.random.key(0))
    np.testing.assert_array_equal(pipe(other, key=jax.random.key(0), classes="face_parsing_pytorch"), expected)
    np.testing.assert_array_equal(pipe(Image.fromarray(FACE), key=jax.random.PRNGKey(0)), expected)
    np.testing.assert_array_equal(pipe(CELEBAMASK_HQ.colorize(FACE), key=jax.random.key(0)), expected)
    np.testing.assert_array_equal(pipe(np.eye(19)[FACE], key=jax.random.key(0), num_samples=1.0), expected)


def test_what_is_cropped_and_what_a_folder_leaves_out_is_said(capsys, weights, tmp_path):
    folder = tmp_path / "masks"
    folder.mkdir()
    (folder / "notes.txt").touch()
    wide = np.concatenate([FACE, np.zeros((64, 128), np.uint8)], 1)
    (folder / "wide.png").write_bytes(photos.encode_png(wide))
    sample(weights, "--mask", folder, "--out", tmp_path / "out")
    said = capsys.readouterr().err
    assert "1 entries are left out, which are no mask files: notes.txt" in said
    assert "1 of 1 masks are not square (192x64) and are cropped" in said


def test_a_mask_may_overwrite_nothing_beside_it(capsys, weights, tmp_path):
    (tmp_path / "face.png").write_bytes(photos.encode_png(FACE))
    (tmp_path / "face_0.png").write_bytes(b"somebody's own")
    message = refused(capsys, weights, "--mask", tmp_path / "face.png", "--out", tmp_path)
    assert "face_0.png exists already" in message
    assert (tmp_path / "face_0.png").read_bytes() == b"somebody's own"


def test_numbers_of_faces_share_few_compiled_programs(pipe):
    pipe.config = dataclasses.replace(pipe.config, sample=dataclasses.replace(pipe.config.sample, batch_size=64))
    compiled = pipe.sampler.num_programs
    before = compiled()
    shapes = {len(pipe(FACE, key=jax.random.key(0), num_samples=count)) for count in range(9, 17)}
    assert shapes == set(range(9, 17))
    assert compiled() - before == 1


def test_faces_do_not_depend_on_how_many_are_sampled(pipe):
    many = pipe(FACE, key=jax.random.key(0), num_samples=5)
    one = pipe(FACE, key=jax.random.key(0))
    # Batches of different sizes round differently.
    np.testing.assert_allclose(many[0].astype(int), one[0].astype(int), atol=1)
