"""The files of an edit: a photograph, its mask before and after, and the region between."""

from pathlib import Path

import numpy as np

from sisma_jax.data import photos
from sisma_jax.data.classes import CELEBAMASK_HQ
from sisma_jax.data.drawing import draw_face


def write_edit(folder: Path) -> tuple[dict[str, Path], np.ndarray, np.ndarray]:
    """Writes photo, before, edited and region; returns the files, the photograph, and where it is to change.

    The photograph has twice the masks' resolution, as in CelebAMask-HQ.
    """
    photo, mask = draw_face(np.random.default_rng(5), 32)
    photo = np.kron(photo, np.ones((2, 2, 1), np.uint8))
    changed = np.zeros((32, 32), bool)
    changed[4:12, 8:24] = True
    edited = np.where(changed, (mask + 1) % len(CELEBAMASK_HQ), mask)
    pictures = {"photo": photo, "before": mask, "edited": edited, "region": 255 * changed.astype(np.uint8)}
    files = {name: folder / f"{name}.png" for name in pictures}
    for name, file in files.items():
        file.write_bytes(photos.encode_png(pictures[name]))
    return files, photo, np.kron(changed, np.ones((2, 2), bool))
