"""The command `segment`: predicts the masks of photographs, which `sample` and edits accept."""

import dataclasses

import numpy as np

from sisma_jax.commands.report import output_folder, require_free, tell
from sisma_jax.config import Config
from sisma_jax.data import masks, photos
from sisma_jax.data.image_files import PHOTO_SUFFIXES, distinct_names, list_images
from sisma_jax.data.photo_files import read_photo, to_8_bits
from sisma_jax.errors import InputError
from sisma_jax.evaluation import grids
from sisma_jax.files import AnyPath, to_path, write_atomically
from sisma_jax.models.face_parser import FaceParser
from sisma_jax.parallel.agreement import is_primary
from sisma_jax.runs import parser_file
from sisma_jax.runs.export import load_exported
from sisma_jax.runs.folder import RunFolder
from sisma_jax.segmentation import FaceMask, paint, segment

_GRID_NAME = "grid.png"
_GRID_CELL = 256


@dataclasses.dataclass(frozen=True)
class Segment:
    """Writes the masks of the faces in photographs, as `sample` reads them."""

    image: str
    """Photograph, or a folder of photographs. The faces in it are found first."""
    weights: str = ""
    """File that the command `export` wrote, to use in place of a run and its configuration."""
    out: str = ""
    """Folder for the masks. If empty: masks/NUMBER."""
    overwrite: bool = False
    """Replace existing masks in the folder."""

    def run(self, config: Config, workdir: AnyPath) -> None:
        """Runs the command with the face parser of the run in `workdir`, of the file `weights`, or of `parser.weights`.

        For each photograph, NAME.png is the mask of its face: one square of class indices. Where the photograph shows
        more than this square, NAME_photo.png is the mask of the whole photograph. Several faces are numbered, the
        largest first.

        Raises:
          InputError: a photograph or the face parser cannot be read, an output file exists, or the folder for the masks
            cannot be created.
        """
        parser = load_parser(config, workdir, self.weights)
        files = distinct_names(list_images(to_path(self.image), PHOTO_SUFFIXES, "photograph"))
        with output_folder(self.out, to_path("masks")) as out:
            require_free([out / _GRID_NAME, *(out / f"{name}.png" for name in files)], self.overwrite)
            if not is_primary():
                return
            rows, written = [], {_GRID_NAME}
            for name, file in files.items():
                photo = to_8_bits(read_photo(file).pixels)
                faces = segment(photo, parser, str(file))
                found = _masks(name, photo, faces)
                require_free([out / one for one in found], self.overwrite)
                if taken := written & found.keys():
                    raise InputError(f"{file}: another photograph has masks of the name {min(taken)}; rename one.")
                written |= found.keys()
                for one, mask in found.items():
                    write_atomically(out / one, photos.encode_png(mask))
                rows += [_cells(photo, face) for face in faces]
            shown, crops = (np.stack(column) for column in zip(*rows, strict=True))
            grid = grids.sample_grid(shown, crops[:, None], classes=parser.classes, title="photograph")
            grids.save_png(out / _GRID_NAME, grid)
            tell(f"Masks of {len(rows)} faces: {out}, side by side with the photographs in {out / _GRID_NAME}")


def load_parser(config: Config, workdir: AnyPath, weights: str) -> FaceParser:
    """Returns the face parser that `parser.weights` names, that of an exported file, or that of a run.

    Args:
      config: of the run; its `parser.weights` takes precedence.
      workdir: folder of the run.
      weights: exported file to use in place of the run; "" for none.

    Raises:
      InputError: there is no face parser, or it is damaged.
    """
    if config.parser.weights:
        return parser_file.load(config.parser.weights, config.data.classes)
    if weights:
        parser = load_exported(weights).parser
        if parser is None:
            raise InputError(f"{weights} holds no face parser; train one (`parser`) and export the run again.")
        return parser
    run = RunFolder.open(workdir, config)
    if not run.has_parser():
        raise InputError(f"{workdir} has no face parser; the command `parser` trains one.")
    return run.parser


def _cells(photo: np.ndarray, face: FaceMask) -> tuple[np.ndarray, np.ndarray]:
    """Returns the mask and the photograph of a face at the size of a cell of the grid."""
    crop = photos.resize_image(face.square.crop(photo), _GRID_CELL)
    return masks.resize_mask(face.mask, _GRID_CELL), crop


def _masks(name: str, photo: np.ndarray, faces: list[FaceMask]) -> dict[str, np.ndarray]:
    """Returns the masks of a photograph by their file names."""
    names = [name] if len(faces) == 1 else [f"{name}_{number}" for number in range(1, len(faces) + 1)]
    masks = {f"{one}.png": face.mask for one, face in zip(names, faces, strict=True)}
    height, width, _ = photo.shape
    if len(faces) > 1 or faces[0].mask.shape != (height, width):
        masks[f"{name}_photo.png"] = paint(faces, height, width)
    return masks
