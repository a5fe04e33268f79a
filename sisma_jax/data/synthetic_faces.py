"""A data set of procedurally drawn faces. It needs no download, and its masks are exact."""

import functools
from collections.abc import Iterator

import numpy as np
import tensorflow_datasets as tfds

from sisma_jax.config import DataConfig
from sisma_jax.data import photos
from sisma_jax.data.drawing.portrait import draw_face
from sisma_jax.data.shards import ShardRecipe

# The seed of the faces. It is fixed, so that runs with different training seeds use the same data.
SEED = 0
FACES_PER_SHARD = 256


def draw_faces(ids: range, size: int) -> Iterator[dict[str, bytes | int]]:
    """Yields one record per face: image and mask as the bytes of PNG files, and the id.

    Args:
      ids: ids of the faces; an id and `SEED` determine a face.
      size: height and width of image and mask, in pixels.
    """
    for index in ids:
        image, mask = draw_face((SEED, index), size)
        yield {"image": photos.encode_png(image), "mask": photos.encode_png(mask), "id": index}


def recipe(config: DataConfig) -> ShardRecipe:
    """Returns the recipe of the shards with `config.num_train` training and `config.num_test` test faces.

    The ids of the test split follow those of the training split. The size is `config.image_size`.
    """
    # Rename the variant whenever the same seed gives a different image.
    size, num_train, total = config.image_size, config.num_train, config.num_train + config.num_test
    splits = {"train": range(num_train), "test": range(num_train, total)}
    features = {
        "image": tfds.features.Image(shape=(size, size, 3), encoding_format="png"),
        "mask": tfds.features.Image(shape=(size, size, 1), encoding_format="png"),
        "id": np.int64,
    }
    return ShardRecipe(
        name="synthetic_faces",
        variant=f"size{size}_train{num_train}_test{config.num_test}_seed{SEED}",
        features=tfds.features.FeaturesDict(features),
        jobs={
            name: [
                functools.partial(draw_faces, ids[start : start + FACES_PER_SHARD], size)
                for start in range(0, len(ids), FACES_PER_SHARD)
            ]
            for name, ids in splits.items()
        },
        num_records=total,
        information={"description": f"Drawn faces with masks of {len(config.classes)} classes."},
    )
