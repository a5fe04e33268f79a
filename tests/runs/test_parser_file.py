import dataclasses
import json

import jax
import numpy as np
import pytest
import safetensors.numpy

from sisma_jax.data.classes import CELEBAMASK_HQ, ClassSet
from sisma_jax.errors import InputError
from sisma_jax.models.face_parser import FaceParser, init_params, make_graph
from sisma_jax.runs import parser_file

WIDTH = 8


@pytest.fixture(scope="module")
def parser() -> FaceParser:
    return FaceParser(make_graph(WIDTH, 19), init_params(jax.random.key(0), WIDTH, 19), CELEBAMASK_HQ, 16)


@pytest.fixture
def path(parser, tmp_path):
    parser_file.save(parser, tmp_path / "parser.safetensors")
    return tmp_path / "parser.safetensors"


def test_a_saved_parser_predicts_the_same(parser, path):
    loaded = parser_file.load(path, CELEBAMASK_HQ)
    assert list(path.parent.iterdir()) == [path]
    assert (loaded.classes, loaded.image_size) == (CELEBAMASK_HQ, 16)
    assert jax.tree.structure(loaded.params) == jax.tree.structure(parser.params)
    jax.tree.map(np.testing.assert_array_equal, loaded.params, parser.params)
    images = np.random.default_rng(3).integers(0, 256, (4, 16, 16, 3)).astype(np.uint8)
    np.testing.assert_array_equal(loaded.predict(images), parser.predict(images))


def overwrite_middle(data):
    middle = len(data) // 2
    return data[:middle] + b"damaged!" + data[middle + 8 :]


DAMAGES = {
    "empty": lambda data: b"",
    "truncated": lambda data: data[: len(data) // 2],
    "overwritten": overwrite_middle,
    "overwritten_at_the_start": lambda data: b"damaged!" + data[8:],
    "array_file": lambda data: b"\x93NUMPY",
    "text": lambda data: b"text",
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_file_is_named(path, damage):
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(InputError, match=r"parser\.safetensors is damaged"):
        parser_file.load(path, CELEBAMASK_HQ)


def test_another_file_is_named(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(safetensors.numpy.save({"weights": np.zeros(3, np.float32)}))
    with pytest.raises(InputError, match=r"model\.safetensors is not a face parser that this release"):
        parser_file.load(path, CELEBAMASK_HQ)


@pytest.mark.parametrize(
    ("arrays", "reason"),
    [
        ({"weights": np.zeros(3, np.float32)}, "does not hold a face parser of this release:"),
        ({"norm.bias": np.zeros(WIDTH, np.float32)}, "a face parser"),
        ({"norm.bias": np.array(1, np.float32)}, "a face parser"),
        ({}, "the file has nothing"),
    ],
    ids=["other_names", "too_few", "scalar", "none"],
)
def test_other_arrays_are_named(arrays, reason):
    description = json.dumps({"classes": dataclasses.asdict(CELEBAMASK_HQ), "image_size": 16})
    with pytest.raises(InputError, match=reason):
        parser_file.unpack(arrays, description, "FILE")


@pytest.mark.parametrize("description", ["", "[]", "{}", '{"classes": {}, "image_size": 16}', '{"classes": 3}'])
def test_a_description_that_is_none_is_refused(parser, description):
    with pytest.raises(InputError, match="FILE"):
        parser_file.unpack(parser_file.pack(parser)[0], description, "FILE")


def test_a_parameter_that_is_not_finite_is_named(parser):
    arrays, description = parser_file.pack(parser)
    arrays["norm.bias"] = np.full_like(arrays["norm.bias"], np.nan)
    with pytest.raises(InputError, match=r"the parameter norm\.bias of the face parser is not finite"):
        parser_file.unpack(arrays, description, "FILE")


def test_a_parser_of_other_classes_is_refused(path):
    fewer = ClassSet("Two", ("a", "b"), ((0, 0, 0), (1, 1, 1)))
    renamed = dataclasses.replace(CELEBAMASK_HQ, title="Renamed", names=CELEBAMASK_HQ.names[::-1])
    for classes in (fewer, renamed):
        with pytest.raises(
            InputError, match=f"of the classes of CelebAMask-HQ, and this run has those of {classes.title}"
        ):
            parser_file.load(path, classes)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"nothing\.safetensors: no such file; the command `parser` trains"):
        parser_file.load(tmp_path / "nothing.safetensors", CELEBAMASK_HQ)
