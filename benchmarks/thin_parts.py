"""How much of a mask the denoiser is told: thin parts in the mask encoder's features, and in resized labels.

    python benchmarks/thin_parts.py --root FOLDER [--num-fit 200] [--num-test 100]

FOLDER holds CelebAMask-HQ, or a part of it. A token of an f8 latent covers 8 x 8 pixels of a 256-px mask. Two ways to
give it labels, nearest and most frequent, are compared with the mask encoder as it is initialised, untrained: a ridge
regression reads the 64 labels under each token from its feature, fitted on some faces and measured on others. IoU of
each class over all test pixels.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx

from benchmarks import measure
from sisma_jax.config import preset
from sisma_jax.data import celebamask_hq
from sisma_jax.data.classes import CELEBAMASK_HQ
from sisma_jax.data.masks import decode_mask, resize_mask
from sisma_jax.models.mask_encoder import MaskEncoder
from sisma_jax.models.patches import depth_to_space, space_to_depth

NUM_CLASSES = len(CELEBAMASK_HQ)
TOKEN = 8
RIDGE = 1e-3


def under_tokens(masks: np.ndarray) -> np.ndarray:
    """Returns the labels under each token: (B, H, W) -> (B, h, w, 64)."""
    return space_to_depth(masks[..., None], TOKEN)


def over_tokens(labels_of_tokens: np.ndarray) -> np.ndarray:
    """Inverts `under_tokens`."""
    return depth_to_space(labels_of_tokens, TOKEN)[..., 0]


def nearest(masks: np.ndarray) -> np.ndarray:
    """Returns the masks that a resize of labels to one per token leaves."""
    small = np.stack([resize_mask(mask, masks.shape[1] // TOKEN) for mask in masks])
    return small.repeat(TOKEN, 1).repeat(TOKEN, 2)


def majority(masks: np.ndarray) -> np.ndarray:
    """Returns the masks with each token's most frequent label all over it."""
    counts = (under_tokens(masks)[..., None] == np.arange(NUM_CLASSES)).sum(-2)
    return counts.argmax(-1).astype(np.uint8).repeat(TOKEN, 1).repeat(TOKEN, 2)


def features(encoder: MaskEncoder, masks: np.ndarray, batch: int = 10) -> np.ndarray:
    """Returns the encoder's features and a constant: float32 (tokens, D + 1)."""
    graph, params = nnx.split(encoder)
    encode = jax.jit(lambda params, mask: nnx.merge(graph, params)(mask))
    parts = [np.asarray(encode(params, masks[i : i + batch])) for i in range(0, len(masks), batch)]
    x = np.concatenate(parts).reshape(-1, parts[0].shape[-1])
    return np.concatenate([x, np.ones((len(x), 1), np.float32)], axis=1)


def read_back(encoder: MaskEncoder, fit: np.ndarray, test: np.ndarray) -> np.ndarray:
    """Returns the test masks as a linear map reads them from features."""
    x = features(encoder, fit)
    target = under_tokens(fit).reshape(len(x), -1)
    gram = x.T @ x + RIDGE * len(x) * np.eye(x.shape[1], dtype=np.float32)
    # One-hot targets a class at a time: all at once are 1,216 columns.
    moments = np.stack([x.T @ (target == label).astype(np.float32) for label in range(NUM_CLASSES)], -1)
    weights = np.linalg.solve(gram.astype(np.float64), moments.reshape(len(gram), -1).astype(np.float64))
    scores = features(encoder, test) @ weights.astype(np.float32)
    side = test.shape[1] // TOKEN
    return over_tokens(scores.reshape(len(test), side, side, TOKEN**2, -1).argmax(-1).astype(np.uint8))


def iou(read: np.ndarray, true: np.ndarray) -> np.ndarray:
    """Returns the intersection over union of each class; NaN where it does not occur."""
    classes = np.arange(NUM_CLASSES)
    both = np.array([((read == label) & (true == label)).sum() for label in classes])
    either = np.array([((read == label) | (true == label)).sum() for label in classes])
    return both / np.where(either, either, np.nan)


def main(root: Path, num_fit: int = 200, num_test: int = 100, size: int = 256, json: Path | None = None):
    """Prints the table.

    Args:
      root: as --data.root.
      num_fit: faces that the regression is fitted on.
      num_test: faces that all are measured on.
      size: of the masks in pixels; a multiple of 8.
      json: the file for the numbers.
    """
    faces = celebamask_hq.list_raw_folder(root, CELEBAMASK_HQ).faces[: num_fit + num_test]
    masks = [decode_mask(face.read(CELEBAMASK_HQ)["mask"], str(face.id), CELEBAMASK_HQ) for face in faces]
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
    rows = [[name, *(f"{of_class[i]:.3f}" for of_class in kept.values())] for i, name in enumerate(CELEBAMASK_HQ.names)]
    rows.append(["mean", *(f"{np.nanmean(of_class):.3f}" for of_class in kept.values())])
    title = f"IoU of what is left of {len(test)} masks of {size} px (files of {own_size} px), a token per 8 x 8 pixels"
    measure.print_table(title, ["", *kept], rows)
    if json:
        numbers = {
            name: dict(zip(CELEBAMASK_HQ.names, of_class.tolist(), strict=True)) for name, of_class in kept.items()
        }
        measure.write_json(json, "thin_parts", settings={"size": size, "num_fit": num_fit}, problems=numbers)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
