"""Measures how well the denoiser's view of a mask preserves thin parts: the mask encoder against resized labels.

    python benchmarks/thin_parts.py --root FOLDER [--num-fit 200] [--num-test 100]

FOLDER contains CelebAMask-HQ or a part of it. A token of an f8 latent covers 8 x 8 pixels of a 256-px mask. The
benchmark compares two ways to reduce these to one label, the nearest and the most frequent one, with the feature that
the mask encoder computes with its initial, untrained parameters. A ridge regression, fitted on some faces and measured
on others, predicts the 64 labels of each token from its feature. The measure is the IoU of each class over all pixels
of the test masks.
"""

import sys
from collections.abc import Mapping
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx

from benchmarks import measure
from sisma_jax.config import preset
from sisma_jax.data.classes import CELEBAMASK_HQ
from sisma_jax.data.masks import decode_mask, resize_mask
from sisma_jax.data.raw_folder import list_raw_folder
from sisma_jax.models.mask_encoder import MaskEncoder
from sisma_jax.models.patches import depth_to_space, space_to_depth

NUM_CLASSES = len(CELEBAMASK_HQ)
TOKEN = 8
RIDGE = 1e-3


def under_tokens(masks: np.ndarray) -> np.ndarray:
    """Returns the labels of the pixels of each token: (B, H, W) -> (B, h, w, 64)."""
    return np.asarray(space_to_depth(masks[..., None], TOKEN))


def over_tokens(labels_of_tokens: np.ndarray) -> np.ndarray:
    """Inverts `under_tokens`."""
    return np.asarray(depth_to_space(labels_of_tokens, TOKEN)[..., 0])


def nearest(masks: np.ndarray) -> np.ndarray:
    """Returns the masks (B, H, W) after a resize to one label per token and back."""
    small = np.stack([resize_mask(mask, masks.shape[1] // TOKEN) for mask in masks])
    return small.repeat(TOKEN, 1).repeat(TOKEN, 2)


def majority(masks: np.ndarray) -> np.ndarray:
    """Returns the masks (B, H, W) with all labels of a token replaced by the most frequent one."""
    counts = (under_tokens(masks)[..., None] == np.arange(NUM_CLASSES)).sum(-2)
    return counts.argmax(-1).astype(np.uint8).repeat(TOKEN, 1).repeat(TOKEN, 2)


def features(encoder: MaskEncoder, masks: np.ndarray, batch: int = 10) -> np.ndarray:
    """Returns the encoder's feature of each token and a constant 1, float32 (tokens, D + 1).

    Args:
      encoder: with its parameters.
      masks: uint8 labels (B, H, W).
      batch: number of masks that are encoded at a time.
    """
    graph, params = nnx.split(encoder)
    encode = jax.jit(lambda params, mask: nnx.merge(graph, params)(mask))
    parts = [np.asarray(encode(params, masks[i : i + batch])) for i in range(0, len(masks), batch)]
    x = np.concatenate(parts).reshape(-1, parts[0].shape[-1])
    return np.concatenate([x, np.ones((len(x), 1), np.float32)], axis=1)


def read_back(encoder: MaskEncoder, fit: np.ndarray, test: np.ndarray) -> np.ndarray:
    """Returns the masks that a linear map predicts from the encoder's features.

    Args:
      encoder: with its parameters.
      fit: the masks on which the map is fitted, uint8 labels (B, H, W).
      test: the masks to predict, uint8 labels (B', H, W).
    """
    x = features(encoder, fit)
    target = under_tokens(fit).reshape(len(x), -1)
    gram = x.T @ x + RIDGE * len(x) * np.eye(x.shape[1], dtype=np.float32)
    # The one-hot targets of one class at a time, since those of all classes have 1,216 columns.
    moments = np.stack([x.T @ (target == label).astype(np.float32) for label in range(NUM_CLASSES)], -1)
    weights = np.linalg.solve(gram.astype(np.float64), moments.reshape(len(gram), -1).astype(np.float64))
    scores = features(encoder, test) @ weights.astype(np.float32)
    side = test.shape[1] // TOKEN
    return over_tokens(scores.reshape(len(test), side, side, TOKEN**2, -1).argmax(-1).astype(np.uint8))


def iou(read: np.ndarray, true: np.ndarray) -> np.ndarray:
    """Returns the intersection over union of each class, float64 (classes,); NaN for a class that does not occur.

    Args:
      read: predicted labels.
      true: correct labels, with the shape of `read`.
    """
    classes = np.arange(NUM_CLASSES)
    both = np.array([((read == label) & (true == label)).sum() for label in classes])
    either = np.array([((read == label) | (true == label)).sum() for label in classes])
    return both / np.where(either, either, np.nan)


def _encoded_mask(record: Mapping[str, object]) -> bytes:
    mask = record["mask"]
    assert isinstance(mask, bytes)  # by the format of the records
    return mask


def main(root: Path, num_fit: int = 200, num_test: int = 100, size: int = 256, json: Path | None = None) -> None:
    """Prints a table of the IoU of each class.

    Args:
      root: folder of the raw data, as --data.root.
      num_fit: number of faces on which the regression is fitted.
      num_test: number of faces on which all ways are measured.
      size: side of the masks in pixels; a multiple of 8.
      json: file for the numbers.
    """
    faces = list_raw_folder(root, CELEBAMASK_HQ).faces[: num_fit + num_test]
    masks = [decode_mask(_encoded_mask(face.read(CELEBAMASK_HQ)), str(face.id), CELEBAMASK_HQ) for face in faces]
    own_size = masks[0].shape[0]
    masks = np.stack([resize_mask(mask, size) for mask in masks])
    fit, test = masks[:num_fit], masks[num_fit:]
    config = preset("B")
    encoder = MaskEncoder(
        TOKEN, NUM_CLASSES, config.d_label, config.d_model, dtype=jnp.dtype("float32"), rngs=nnx.Rngs(0)
    )
    kept = {
        "nearest label": iou(nearest(test), test),
        "most frequent label": iou(majority(test), test),
        "mask encoder": iou(read_back(encoder, fit, test), test),
    }
    rows = [[name, *(f"{by_class[i]:.3f}" for by_class in kept.values())] for i, name in enumerate(CELEBAMASK_HQ.names)]
    rows.append(["mean", *(f"{np.nanmean(by_class):.3f}" for by_class in kept.values())])
    title = f"IoU over {len(test)} masks of {size} px (files of {own_size} px), one token per 8 x 8 pixels"
    measure.print_table(title, ["", *kept], rows)
    if json:
        numbers = {
            name: dict(zip(CELEBAMASK_HQ.names, by_class.tolist(), strict=True)) for name, by_class in kept.items()
        }
        measure.write_json(json, "thin_parts", settings={"size": size, "num_fit": num_fit}, problems=numbers)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
