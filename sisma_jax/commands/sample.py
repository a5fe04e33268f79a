"""The command `sample`: faces for masks of one's own, and edits of photographs."""

import dataclasses
import logging
from pathlib import Path
from typing import Annotated, Any

import cv2
import jax
import numpy as np
import tyro

from sisma_jax import config_files, pipeline
from sisma_jax.commands.evaluate import load_or_train_segmenter
from sisma_jax.commands.report import grid_scale, output_folder, require_free, tell
from sisma_jax.config import Config, Sampling
from sisma_jax.data import masks as masks_lib
from sisma_jax.data import photos
from sisma_jax.data.dataset import DataSet
from sisma_jax.errors import InputError
from sisma_jax.evaluation import grids
from sisma_jax.files import AnyPath, to_path
from sisma_jax.parallel import sharding
from sisma_jax.parallel.agreement import is_primary
from sisma_jax.pipeline import Pipeline
from sisma_jax.runs.export import load_exported
from sisma_jax.runs.folder import Checkpoint, RunFolder

logger = logging.getLogger(__name__)

_GRID_NAME = "grid.png"


@dataclasses.dataclass(frozen=True)
class Sample:
    """Samples faces for masks of your own with a trained run, or with an exported file."""

    mask: str
    """A mask file (PNG of class indices), or a folder of them."""
    weights: str = ""
    """A file that the command `export` wrote, in place of the run and its configuration."""
    checkpoint: Checkpoint = "newest"
    """Of the run: the newest, the best (lowest held-out loss), or that of a step."""
    image: str = ""
    """A photograph to repaint where its mask was changed; all else stays as it is."""
    image_mask: str = ""
    """The photograph's mask before it was edited. Without this and region, the run's segmenter guesses it."""
    region: str = ""
    """What to repaint, in place of image_mask: a picture that is black elsewhere."""
    margin: int | None = None
    """Pixels of the model's resolution by which the repainted region reaches out of what was changed, blended with the
    photograph; a 32nd of that resolution if not given."""
    out: str = ""
    """Folder for the images; WORKDIR/samples/NUMBER if empty, or samples/NUMBER with weights."""
    overwrite: bool = False
    """Replace images that exist in that folder."""
    num: int = 4
    """Faces per mask."""
    sampling: Annotated[Sampling, tyro.conf.arg(name="")] = Sampling()
    """Default: the configuration's."""

    def run(self, config: Config, workdir: AnyPath) -> None:
        self._check()
        files = masks_lib.mask_files(self.mask)
        names = _output_names(files, self.num)
        classes = config.data.classes
        masks = [masks_lib.read_mask_file(file, classes) for file in files]
        image = photos.read_image_file(self.image) if self.image else None
        change: dict[str, Any] = {}
        if self.image_mask:
            change["image_mask"] = masks_lib.read_mask_file(self.image_mask, classes)
        if self.region:
            change["region"] = masks_lib.decode_part(photos.read_bytes(self.region), self.region)
        run = None if self.weights else RunFolder.open(workdir, config)
        with output_folder(self.out, to_path("samples") if run is None else run.samples) as out:
            require_free([out / name for row in names for name in (*row, _GRID_NAME)], self.overwrite)
            trained = self._load(config, run)
            size = config.data.image_size
            shown_masks = np.stack([masks_lib.resize_mask(mask, size) for mask in masks])
            # The same keys for every mask: what differs between two edits of a mask is what was edited.
            key = jax.random.key(self.sampling.seed)
            keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, np.arange(self.num))
            settings = {"num_samples": self.num, "sampling": self.sampling}
            if image is None:
                faces = trained(shown_masks, key=jax.numpy.tile(keys, len(masks)), **settings)
                faces = faces.reshape(len(masks), self.num, size, size, 3)
                originals = None
            else:
                changes = [change] * len(masks)
                if run is not None and not change:
                    changes = [{"region": region} for region in _guess_regions(image, shown_masks, run)]
                settings |= {"key": keys, "margin": self.margin}
                faces = [trained.edit(image, mask, **c, **settings) for mask, c in zip(masks, changes, strict=True)]
                originals = np.stack([photos.resize_image(image, size)] * len(masks))
            if not is_primary():
                return
            for row, images in zip(names, faces, strict=True):
                for name, face in zip(row, images, strict=True):
                    grids.save_png(out / name, face)
            shown = np.stack([[photos.resize_image(face, size) for face in row] for row in faces])
            grid = grids.sample_grid(shown_masks, shown, originals, classes=classes, scale=grid_scale(size))
            grids.save_png(out / _GRID_NAME, grid)
            tell(f"Faces: {len(masks) * self.num} in {out}, side by side in {out / _GRID_NAME}")

    def _check(self) -> None:
        if self.num < 1:
            raise InputError(f"`num` must be positive, got {self.num}.")
        is_named = bool(self.image_mask or self.region)
        if not self.image and is_named:
            raise InputError("`image_mask` and `region` belong to an edit: name the photograph with `image`.")
        if self.image and self.weights and not is_named:
            raise InputError("An edit with `weights` needs `image_mask` or `region`: the file holds no segmenter.")

    def _load(self, config: Config, run: RunFolder | None) -> Pipeline:
        mesh = sharding.make_mesh(config.mesh)
        if run is not None:
            return pipeline.from_run(run, checkpoint=self.checkpoint, mesh=mesh)
        exported = load_exported(self.weights)
        if different := config_files.differences(exported.config, config):
            raise InputError(f"{self.weights} holds a model of another configuration:\n  " + "\n  ".join(different))
        return Pipeline(config, exported.params, exported.step, exported.autoencoder, mesh)


def _output_names(files: list[Path], num: int) -> list[list[str]]:
    """Returns the names of the images of each mask file.

    Raises:
      InputError: two files would have images of one name, on a disk that does not tell upper from lower case.
    """
    first: dict[str, Path] = {}
    for file in files:
        other = first.setdefault(file.stem.casefold(), file)
        if other is not file:
            raise InputError(f"The images of {other} and {file} would have the same names; rename one of the two.")
    return [[f"{file.stem}_{number}.png" for number in range(num)] for file in files]


def _guess_regions(image: np.ndarray, masks: np.ndarray, run: RunFolder) -> np.ndarray:
    """Returns where edited masks (n, S, S) differ from what the run's segmenter reads in the image."""
    logger.warning(
        "The image's own mask is not given (image_mask), so what is repainted is where the mask differs from what the "
        "run's small segmenter reads in the image: a rough guess."
    )
    small = photos.resize_image(image, run.config.data.image_size)
    read = load_or_train_segmenter(run, DataSet.open(run.config.data)).predict(small[None])
    # Two readings of one face differ along all outlines: what is thinner than three pixels is no edit.
    square = np.ones((3, 3), np.uint8)
    return np.stack([cv2.morphologyEx(one.astype(np.uint8), cv2.MORPH_OPEN, square) > 0 for one in masks != read])
