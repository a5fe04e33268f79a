"""Features are those of the network, whatever the batches, and are computed once."""

import jax
import numpy as np
import pytest

from sisma_jax.data import photos
from sisma_jax.data.classes import CELEBAMASK_HQ
from sisma_jax.data.dataset import DataSet
from sisma_jax.errors import InputError
from sisma_jax.evaluation import chunk_cache, features
from sisma_jax.evaluation.features import FeatureNetwork, extract
from sisma_jax.evaluation.image_sets import ArrayImages, FolderImages, SplitImages
from sisma_jax.models.face_parser import FaceParser, init_params, make_graph
from tests.tiny import tiny_config


class Counting:
    """A network whose features are mean colours; counts the images that it saw."""

    def __init__(self):
        self.seen = 0

    def __call__(self, images: np.ndarray) -> np.ndarray:
        self.seen += len(images)
        return images.mean(axis=(1, 2))


def network(function) -> FeatureNetwork:
    return FeatureNetwork("mean", function, "0", "none")


def pictures(count: int, size: int = 6, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3)).astype(np.uint8)


def write(folder, images):
    folder.mkdir(exist_ok=True)
    for number, image in enumerate(images):
        (folder / f"{number:04d}.png").write_bytes(photos.encode_png(image))


def test_features_are_those_of_each_image_in_order():
    images = pictures(70)
    np.testing.assert_allclose(
        extract(network(Counting()), ArrayImages(images, "a")), images.mean(axis=(1, 2)), rtol=1e-6
    )


def test_images_of_a_folder_may_differ_in_size(tmp_path):
    images = [*pictures(3, 6), *pictures(2, 9, seed=1), *pictures(1, 6, seed=2)]
    write(tmp_path / "a", images)
    folder = FolderImages.open(tmp_path / "a")
    expected = [image.mean(axis=(0, 1)) for image in images]
    np.testing.assert_allclose(extract(network(Counting()), folder), expected, rtol=1e-6)


def test_an_interrupted_extraction_resumes_and_a_complete_one_is_not_repeated(tmp_path, monkeypatch):
    monkeypatch.setattr(chunk_cache, "IMAGES_PER_CHUNK", 4)
    monkeypatch.setattr(features, "_BATCH_SIZE", 2)
    images, first = ArrayImages(pictures(10), "a"), Counting()

    def interrupted(batch):
        if first.seen >= 6:
            raise KeyboardInterrupt
        return first(batch)

    with pytest.raises(KeyboardInterrupt):
        extract(network(interrupted), images, tmp_path / "cache")
    second = Counting()
    resumed = extract(network(second), images, tmp_path / "cache")
    assert second.seen == 6  # the first chunk of four was kept
    third = Counting()
    np.testing.assert_array_equal(resumed, extract(network(third), images, tmp_path / "cache"))
    assert third.seen == 0
    np.testing.assert_array_equal(resumed, extract(network(Counting()), images))
    other = Counting()
    extract(network(other), ArrayImages(pictures(10, seed=3), "a"), tmp_path / "cache")
    assert other.seen == 10  # other images
    for file in (tmp_path / "cache").iterdir():
        file.write_bytes(file.read_bytes()[:50])
    again = Counting()
    np.testing.assert_array_equal(extract(network(again), images, tmp_path / "cache"), resumed)
    assert again.seen == 10  # damaged files are written again


def test_a_folder_is_known_by_its_names_and_contents(tmp_path):
    write(tmp_path / "a", pictures(3))
    write(tmp_path / "b", pictures(3))
    one, same = FolderImages.open(tmp_path / "a"), FolderImages.open(tmp_path / "b")
    assert one.fingerprint == same.fingerprint
    (tmp_path / "b/0001.png").write_bytes(photos.encode_png(pictures(1, seed=9)[0]))
    assert FolderImages.open(tmp_path / "b").fingerprint != one.fingerprint


def test_folders_without_images_are_refused(tmp_path):
    with pytest.raises(InputError, match="absent does not exist; name a file or a folder of images"):
        FolderImages.open(tmp_path / "absent")
    with pytest.raises(InputError, match="holds no image"):
        FolderImages.open(tmp_path)
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(InputError, match=r"a\.png is a file; name a folder of images"):
        FolderImages.open(tmp_path / "a.png")


def test_a_split_gives_its_images_in_order(tmp_path):
    dataset = DataSet.prepare(tiny_config(tmp_path).data)
    images = SplitImages(dataset, "test", 5)
    (batch,) = dataset.eval_batches("test", 8)
    np.testing.assert_array_equal(np.stack(list(images.images(1, 4))), batch["image"][1:4])
    assert len(images) == 5


def test_features_of_the_face_parser_do_not_depend_on_the_batch():
    parser = FaceParser(make_graph(8, 19), init_params(jax.random.key(0), 8, 19), CELEBAMASK_HQ, 16)
    net, images = features.parser_network(parser), pictures(5, 16)
    together, alone = extract(net, ArrayImages(images, "a")), extract(net, ArrayImages(images[3:4], "a"))
    assert together.shape == (5, 64)
    np.testing.assert_allclose(together[3:4], alone, rtol=1e-4, atol=1e-5)  # rounding in another order
    assert net.fingerprint.startswith("parser-")
