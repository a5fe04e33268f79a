"""The command `sample`: samples faces for mask files, and edits photographs."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Annotated

import jax
import numpy as np
import tyro

from sisma_jax import pipeline
from sisma_jax.commands.report import grid_scale, output_folder, require_free, tell
from sisma_jax.config import Config, Sampling
from sisma_jax.data import masks as masks_lib
from sisma_jax.data import photos
from sisma_jax.data.classes import ClassSet
from sisma_jax.data.mask_files import MaskFile, find_masks
from sisma_jax.data.photo_files import Photo, read_photo, save_photo, to_8_bits
from sisma_jax.errors import InputError
from sisma_jax.evaluation import grids
from sisma_jax.files import AnyPath, to_path
from sisma_jax.parallel import sharding
from sisma_jax.parallel.agreement import is_primary
from sisma_jax.pipeline import Pipeline
from sisma_jax.runs.folder import Checkpoint, RunFolder

_GRID_NAME = "grid.png"


@dataclasses.dataclass(frozen=True)
class Sample:
    """Samples faces for your own masks, or edits a photograph, with a trained run or an exported file."""

    mask: str
    """Mask file, or a folder of mask files: class indices, palettes or class colours, in a lossless format."""
    mask_classes: str = ""
    """Classes in whose order or colours the masks are: a built-in name such as face_parsing_pytorch, or a JSON file. If
    empty: those of the model."""
    weights: str = ""
    """File that the command `export` wrote, to use in place of a run and its configuration."""
    checkpoint: Checkpoint = "newest"
    """Checkpoint of the run: the newest, the best (see train.best), or the one of a step."""
    image: str = ""
    """Photograph to edit. It is generated anew where its mask was edited; all other pixels stay unchanged."""
    image_mask: str = ""
    """Mask of the photograph before it was edited. Without image_mask and region, the face parser predicts it."""
    region: str = ""
    """Image that is black outside of the region to generate, to use in place of image_mask."""
    margin: int | None = None
    """Width of the blended band around the region, in pixels of the model's resolution S. None: S / 32."""
    out: str = ""
    """Folder for the images. If empty: WORKDIR/samples/NUMBER, or samples/NUMBER with weights."""
    overwrite: bool = False
    """Replace existing images in the folder."""
    num: int = 4
    """Faces per mask."""
    sampling: Annotated[Sampling, tyro.conf.arg(name="")] = Sampling()
    """Default: the section `sample` of the configuration."""

    def run(self, config: Config, workdir: AnyPath) -> None:
        """Runs the command on the run in `workdir`, or on the file `weights`.

        Raises:
          InputError: options contradict each other, a mask, an image or a model cannot be read, an output file exists,
            or the folder for the images cannot be created.
        """
        self._check()
        classes = config.data.classes
        named = ClassSet.load(self.mask_classes) if self.mask_classes else None
        order = named or classes
        files = find_masks(self.mask, classes)
        names = [[f"{file.name}_{number}.png" for number in range(self.num)] for file in files]
        given = [file.read(order) for file in files]
        masks = [
            masks_lib.convert_mask(mask, order, classes, str(file)) for file, mask in zip(files, given, strict=True)
        ]
        photo = read_photo(self.image) if self.image else None
        image_mask = find_masks(self.image_mask, classes)[0].read(order) if self.image_mask else None
        region = masks_lib.decode_part(photos.read_bytes(self.region), self.region) if self.region else None
        if photo is None:
            masks_lib.report_cropping(masks)
        run = None if self.weights else RunFolder.open(workdir, config)
        with output_folder(self.out, to_path("samples") if run is None else run.samples) as out:
            require_free([out / name for row in names for name in (*row, _GRID_NAME)], self.overwrite)
            trained = self._load(config, run)
            if photo is None and (prior := trained.mask_prior) is not None:
                # Checked here, by the names of the files, and not again by the pipeline.
                trained.mask_prior = None
                masks = [
                    prior.check(mask, classes, str(file), named=named) for file, mask in zip(files, masks, strict=True)
                ]
            size = config.data.image_size
            shown_masks = np.stack([masks_lib.resize_mask(mask, size) for mask in masks])
            # The same keys for every mask, so that two edits of a mask differ only where the masks differ.
            key = jax.random.key(self.sampling.seed)
            keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, np.arange(self.num))
            if photo is None:
                faces = trained(
                    shown_masks,
                    key=jax.numpy.tile(keys, len(masks)),
                    num_samples=self.num,
                    sampling=self.sampling,
                ).reshape(len(masks), self.num, size, size, 3)
                originals = None
            else:
                edit = functools.partial(
                    trained.edit,
                    photo.pixels,
                    classes=named,
                    key=keys,
                    image_mask=image_mask,
                    region=region,
                    margin=self.margin,
                    num_samples=self.num,
                    sampling=self.sampling,
                )
                faces = [_named(file, edit, mask) for file, mask in zip(files, given, strict=True)]
                originals = np.stack([photos.resize_image(to_8_bits(photo.pixels), size)] * len(masks))
            if not is_primary():
                return
            for row, images in zip(names, faces, strict=True):
                for name, face in zip(row, images, strict=True):
                    save_photo(out / name, Photo(face) if photo is None else dataclasses.replace(photo, pixels=face))
            shown = np.stack([[photos.resize_image(to_8_bits(face), size) for face in row] for row in faces])
            grid = grids.sample_grid(shown_masks, shown, originals, classes=classes, scale=grid_scale(size))
            grids.save_png(out / _GRID_NAME, grid)
            tell(f"Faces: {len(masks) * self.num} in {out}, side by side in {out / _GRID_NAME}")

    def _check(self) -> None:
        if self.num < 1:
            raise InputError(f"`num` must be positive, got {self.num}.")
        is_named = bool(self.image_mask or self.region)
        if not self.image and is_named:
            raise InputError("`image_mask` and `region` apply only to an edit; name the photograph with `image`.")

    def _load(self, config: Config, run: RunFolder | None) -> Pipeline:
        mesh = sharding.make_mesh(config.mesh)
        if run is not None:
            return pipeline.from_run(run, checkpoint=self.checkpoint, mesh=mesh)
        return pipeline.from_exported(self.weights, config, mesh=mesh)


def _named(file: MaskFile, edit: Callable[[np.ndarray], np.ndarray], mask: np.ndarray) -> np.ndarray:
    """Returns the edits of a mask; an error names its file."""
    try:
        return edit(mask)
    except InputError as error:
        raise InputError(f"{file}: {error}") from error
