"""TFDS builder of drawn faces: the embedded data set, which needs no download and whose masks are exact.

builder(config.data).download_and_prepare() -> array_record shards of {"image", "mask", "id"}
"""

import dataclasses
import functools
import itertools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import tensorflow_datasets as tfds
import tqdm

from sisma_jax.config import DataConfig
from sisma_jax.data.drawing.workers import encoded_faces

# The seed of the faces themselves. Fixed, so that runs with different training seeds see the same data.
SEED = 0
# TFDS keeps a shard in memory while it writes it.
_FACES_PER_SHARD = 1024

Record = tuple[int, dict[str, bytes | int]]


@dataclasses.dataclass(eq=False)
class SyntheticFacesConfig(tfds.core.BuilderConfig):
    """What is drawn; the name, and with it the folder, follows from the values."""

    name: str = dataclasses.field(init=False)
    image_size: int = 64
    num_train: int = 4096
    num_test: int = 256
    seed: int = SEED

    def __post_init__(self) -> None:
        self.name = f"size{self.image_size}_train{self.num_train}_test{self.num_test}_seed{self.seed}"


class SyntheticFaces(tfds.core.ShardBasedBuilder):
    """Procedurally drawn faces with exact masks. The ids of the test split follow those of the training split.

    Not a GeneratorBasedBuilder: above 1 GB that one shuffles through temporary files written by TensorFlow, which is
    not installed. The order on disk does not matter, for Grain shuffles.
    """

    name = "synthetic_faces"
    # To be raised whenever the same seed gives another picture.
    VERSION = tfds.core.Version("1.0.0")
    # No checksums of downloads. To look for their file, TFDS would import importlib_resources, which it does not
    # require on Python 3.9 and newer.
    url_infos = None

    def _info(self) -> tfds.core.DatasetInfo:
        size = self.builder_config.image_size
        return tfds.core.DatasetInfo(
            builder=self,
            description="Drawn faces with masks of 19 classes.",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(size, size, 3), encoding_format="png"),
                    "mask": tfds.features.Image(shape=(size, size, 1), encoding_format="png"),
                    "id": np.int64,
                }
            ),
            disable_shuffling=True,
        )

    def _shard_iterators_per_split(
        self, dl_manager: tfds.download.DownloadManager
    ) -> Mapping[str, Sequence[Callable[[], Iterator[Record]]]]:
        del dl_manager
        config = self.builder_config
        total = config.num_train + config.num_test
        # One run of the workers for all shards, which TFDS writes one after the other in the order given.
        records = _records(config, range(total))
        splits = {"train": range(config.num_train), "test": range(config.num_train, total)}
        return {
            name: [
                functools.partial(itertools.islice, records, len(ids[start : start + _FACES_PER_SHARD]))
                for start in range(0, len(ids), _FACES_PER_SHARD)
            ]
            for name, ids in splits.items()
        }


def _records(config: SyntheticFacesConfig, ids: range) -> Iterator[Record]:
    # disable=None: a bar on a terminal, silence elsewhere.
    with tqdm.tqdm(total=len(ids), desc="synthetic faces", unit=" faces", disable=None) as bar:
        for index, image, mask in encoded_faces(config.seed, ids, config.image_size):
            bar.update()
            yield index, {"image": image, "mask": mask, "id": index}


def builder(config: DataConfig) -> tfds.core.DatasetBuilder:
    """Returns the builder of the data set that a configuration asks for, in its cache folder."""
    drawn = SyntheticFacesConfig(
        image_size=config.image_size, num_train=config.num_train, num_test=config.num_test, seed=SEED
    )
    return SyntheticFaces(config=drawn, data_dir=os.path.expanduser(config.cache_dir), file_format="array_record")
