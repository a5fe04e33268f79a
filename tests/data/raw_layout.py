"""Writes small raw folders in the two layouts that `celebamask_hq` reads."""

from collections.abc import Iterable
from pathlib import Path

import cv2
import numpy as np

from sisma_jax.data.classes import CELEBAMASK_HQ, ClassSet


def random_image(seed: int, size: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (size, size, 3), np.uint8)


def random_mask(seed: int, size: int, classes: ClassSet = CELEBAMASK_HQ) -> np.ndarray:
    """A label map with every class, no symmetry and no class in one place in two faces."""
    return np.random.default_rng(seed).integers(0, len(classes), (size, size)).astype(np.uint8)


def write_png(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), array)


def write_label_maps(
    root: Path, ids: Iterable[int], size: int = 16, classes: ClassSet = CELEBAMASK_HQ
) -> dict[int, np.ndarray]:
    """Writes images/<id>.jpg and labels/<id>.png, the one zero-padded, the other not. Returns the masks by id."""
    (root / "images").mkdir(parents=True, exist_ok=True)
    masks = {id: random_mask(id, size, classes) for id in ids}
    for id, mask in masks.items():
        assert cv2.imwrite(str(root / "images" / f"{id}.jpg"), random_image(id, size))
        write_png(root / "labels" / f"{id:05d}.png", mask)
    return masks


def part_file(root: Path, id: int, part: str) -> Path:
    return root / "CelebAMask-HQ-mask-anno" / str(id // 2000) / f"{id:05d}_{part}.png"


def write_official(root: Path, ids: Iterable[int], image_size: int = 32, mask_size: int = 16) -> None:
    """Writes CelebA-HQ-img/<id>.jpg, and for each id parts that overlap: skin, nose and hair, but no other."""
    (root / "CelebA-HQ-img").mkdir(parents=True, exist_ok=True)
    half = mask_size // 2
    for id in ids:
        assert cv2.imwrite(str(root / "CelebA-HQ-img" / f"{id}.jpg"), random_image(id, image_size))
        skin, nose, hair = np.zeros((3, mask_size, mask_size), np.uint8)
        skin[2:, :] = 255
        nose[half : half + 2, half : half + 4] = 255
        hair[: half + 1, :] = 255
        write_png(part_file(root, id, "skin"), skin)
        write_png(part_file(root, id, "nose"), np.repeat(nose[..., None], 3, axis=-1))
        write_png(part_file(root, id, "hair"), hair)


def official_mask(mask_size: int = 16) -> np.ndarray:
    """What the parts of `write_official` make: hair, the last in class order, covers half of the nose."""
    half = mask_size // 2
    mask = np.full((mask_size, mask_size), CELEBAMASK_HQ.index["skin"], np.uint8)
    mask[half : half + 2, half : half + 4] = CELEBAMASK_HQ.index["nose"]
    mask[: half + 1] = CELEBAMASK_HQ.index["hair"]
    return mask
