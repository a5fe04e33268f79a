"""Face parsers as files: safetensors with the parameters, the classes and the image size. Also reads public weights.

All metadata are strings: format, version, parser (JSON of the classes and the image size), and crc32 (of the bytes of
all arrays, sorted by name).
"""

import dataclasses
import functools
import json
import os
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from flax import nnx

from sisma_jax.data.classes import ClassSet
from sisma_jax.errors import InputError
from sisma_jax.files import on_disk, to_path, write_atomically
from sisma_jax.models import bisenet
from sisma_jax.models.face_parser import FaceParser, init_params, make_graph
from sisma_jax.runs import flat_trees
from sisma_jax.torch_files import TORCH_SUFFIXES, read_state_dict

_FORMAT = "sisma_jax face parser"
_VERSION = "1"
_PARSER = "parser"
_OF_BISENET = "cp.resnet.conv1.weight"


def save(parser: FaceParser, path: str | os.PathLike[str]) -> None:
    """Writes a face parser as one file, atomically.

    Args:
      parser: one of the project's own, with a `FaceUNet` as its network.
      path: of the file, on the disk or in a bucket.

    Raises:
      InputError: the file cannot be written.
    """
    arrays, description = pack(parser)
    metadata = {"format": _FORMAT, "version": _VERSION, _PARSER: description}
    try:
        write_atomically(path, safetensors.numpy.save(arrays, metadata | {"crc32": flat_trees.crc32(arrays)}))
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error}); free disk space or fix the folder.") from error


def load(path: str | os.PathLike[str], classes: ClassSet) -> FaceParser:
    """Returns the face parser that `save` wrote, or face-parsing.PyTorch (BiSeNet) with its public weights.

    Args:
      path: of the file, on the disk or in a bucket; *.pth are weights of PyTorch,
        which may also be safetensors.
      classes: that it must predict. The classes of face-parsing.PyTorch may have any order.

    Raises:
      InputError: the file does not exist, is damaged, was written by another program or version, or holds a face parser
        of other classes.
    """
    path = to_path(path)
    if path.suffix in TORCH_SUFFIXES:
        return _bisenet(read_state_dict(path), classes, str(path))
    try:
        with on_disk(path) as file, safetensors.safe_open(file, framework="numpy") as content:
            metadata = content.metadata() or {}
            arrays = {name: content.get_tensor(name) for name in content.keys()}
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file; the command `parser` trains a face parser.") from error
    except (OSError, TypeError, safetensors.SafetensorError) as error:
        raise InputError(f"{path} is damaged or not a face parser ({error}).") from error
    if _OF_BISENET in arrays:
        return _bisenet(read_state_dict(path), classes, str(path))
    if metadata.get("format") != _FORMAT or metadata.get("version") != _VERSION:
        raise InputError(f"{path} is not a face parser that this release of sisma_jax wrote.")
    if metadata.get("crc32") != flat_trees.crc32(arrays):
        raise InputError(f"{path} is damaged (wrong checksum); copy it again, or delete it and train a new one.")
    parser = unpack(arrays, metadata.get(_PARSER, ""), str(path))
    if parser.classes.fingerprint != classes.fingerprint:
        raise InputError(
            f"{path} holds a face parser of the classes of {parser.classes.title}, and this run has those of "
            f"{classes.title}; give one that predicts these, or train one with the command `parser`."
        )
    return parser


def _bisenet(weights: dict[str, np.ndarray], classes: ClassSet, source: str) -> FaceParser:
    graph, params = nnx.split(bisenet.from_weights(weights, classes, source))
    return FaceParser(graph, nnx.to_pure_dict(params), classes, bisenet.IMAGE_SIZE, is_own=False)


def pack(parser: FaceParser) -> tuple[dict[str, np.ndarray], str]:
    """Returns the arrays of a face parser by name, and a description (JSON) of what else it needs."""
    arrays = {name: np.asarray(array) for name, array in flat_trees.flatten(parser.params).items()}
    return arrays, json.dumps({"classes": dataclasses.asdict(parser.classes), "image_size": parser.image_size})


def unpack(arrays: Mapping[str, np.ndarray], description: str, source: str) -> FaceParser:
    """Returns the face parser that `pack` took apart.

    Args:
      arrays: by name.
      description: as `pack` returned it.
      source: where they come from, for the error message.

    Raises:
      InputError: the arrays or the description are not those of a face parser, or an array is not finite.
    """
    try:
        values = json.loads(description)
        classes, image_size = ClassSet.from_json(values["classes"], source), int(values["image_size"])
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{source} does not describe the classes of its face parser ({error!r}).") from error
    width = max(8, np.size(arrays.get("norm.bias", ())) // 8 * 8)
    init = functools.partial(init_params, width=width, num_classes=len(classes))
    shapes = jax.eval_shape(init, jax.random.key(0))
    expected = flat_trees.forms(flat_trees.flatten_abstract(shapes))
    if lines := flat_trees.list_differences(flat_trees.forms(arrays), expected, owners=("the file", "a face parser")):
        raise InputError(f"{source} does not hold a face parser of this release:{flat_trees.shorten(lines)}")
    if bad := next((name for name, array in arrays.items() if not np.isfinite(array).all()), None):
        raise InputError(f"{source} cannot be used: the parameter {bad} of the face parser is not finite.")
    return FaceParser(
        make_graph(width, len(classes)),
        flat_trees.unflatten(shapes, {name: jnp.asarray(array) for name, array in arrays.items()}),
        classes,
        image_size,
    )
