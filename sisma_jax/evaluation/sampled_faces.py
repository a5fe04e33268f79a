"""Faces sampled for held-out masks, kept as PNG files, so that an interrupted evaluation resumes.

The memory does not depend on the number of faces. Other tools can measure the folders.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Iterator

import jax
import numpy as np
from tqdm import tqdm

from sisma_jax.data.dataset import DataSet
from sisma_jax.data.photos import encode_png, read_image_file
from sisma_jax.files import AnyPath, bucket_errors, write_atomically
from sisma_jax.parallel import sharding
from sisma_jax.parallel.agreement import from_primary, is_primary, together
from sisma_jax.pipeline import Pipeline
from sisma_jax.runs import flat_trees


def params_checksum(trained: Pipeline) -> str:
    """Returns the CRC-32 of the denoiser's parameters; every process must call this.

    Args:
      trained: the pipeline.
    """
    return flat_trees.crc32(flat_trees.flatten(sharding.fetch(trained.params, trained.mesh)))


@dataclasses.dataclass(frozen=True)
class SampledFaces:
    """Faces for the first masks of the test split, in its order; an `ImageSet`.

    Attributes:
      folder: that holds ID.png for each mask.
      ids: of the masks, int64 (N,).
      fingerprint: identifies everything on which the faces depend.
    """

    folder: AnyPath
    ids: np.ndarray
    fingerprint: str

    @property
    def name(self) -> str:
        """What messages call the set."""
        return "samples"

    def __len__(self) -> int:
        return len(self.ids)

    def images(self, start: int, stop: int) -> Iterator[np.ndarray]:
        """Yields the faces from `start` to before `stop`, uint8 (S, S, 3), RGB.

        Raises:
          InputError: a file is missing or damaged.
        """
        return (read_image_file(self.folder / f"{number}.png") for number in self.ids[start:stop])


def sample_faces(
    trained: Pipeline, checksum: str, dataset: DataSet, folder: AnyPath, *, count: int, repetition: int = 0
) -> SampledFaces:
    """Returns a face for each of the first masks of the test split; those that exist are not sampled again.

    Face i depends on the key `fold_in(fold_in(key(seed), repetition), i)`. Every process of a job must call this; the
    first one writes.

    Args:
      trained: the pipeline, with the settings in its configuration's section `sample`.
      checksum: of its parameters, from `params_checksum`.
      dataset: with the masks.
      folder: in which folders for faces are created.
      count: number of masks, at most the size of the test split.
      repetition: number of the face among those of the same mask.

    Raises:
      InputError: the folder cannot be written, or a mask is damaged.
    """
    settings = trained.config.sample
    seed_settings = {name: x for name, x in dataclasses.asdict(settings).items() if name != "batch_size"}
    meaning = (checksum, trained.config.model, trained.config.flow.prediction, seed_settings, dataset.path.name)
    meaning = (*meaning, dataset.config.image_size, repetition)
    fingerprint = hashlib.sha256(repr(meaning).encode()).hexdigest()[:16]
    own = folder / f"faces_{fingerprint}"
    key = jax.random.fold_in(jax.random.key(settings.seed), repetition)
    ids = []
    title = f"faces, repetition {repetition}" if repetition else "faces"
    with tqdm(total=count, desc=title, unit="face", disable=None if is_primary() else True) as progress:
        for batch in dataset.eval_batches("test", sharding.round_up(settings.batch_size, trained.mesh), limit=count):
            files = [own / f"{number}.png" for number in batch["id"]]
            if not from_primary(_all_exist(files)):
                keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, len(ids) + np.arange(len(files)))
                faces = trained(batch["mask"], key=keys)
                with together():
                    if is_primary():
                        _write(own, files, faces)
            ids += batch["id"].tolist()
            progress.update(len(files))
    return SampledFaces(own, np.array(ids, np.int64), fingerprint)


def _all_exist(files: list[AnyPath]) -> Callable[[], bool]:
    def check() -> bool:
        with bucket_errors(files[0]):
            return all(file.exists() for file in files)

    return check


def _write(folder: AnyPath, files: list[AnyPath], faces: np.ndarray) -> None:
    with bucket_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    for file, face in zip(files, faces, strict=True):
        write_atomically(file, encode_png(face))
