"""The 19 semantic classes of CelebAMask-HQ (Lee et al., arXiv 1907.11922).

The only module that knows class numbers, names and colours. A *mask* is an integer array (..., H, W)
whose values are indices into `NAMES`.
"""

import numpy as np

from sisma_jax.errors import InputError

# In the order in which the parts are painted over one another to make a label map.
NAMES = (
    "background",
    "skin",
    "nose",
    "eye_g",
    "l_eye",
    "r_eye",
    "l_brow",
    "r_brow",
    "l_ear",
    "r_ear",
    "mouth",
    "u_lip",
    "l_lip",
    "hair",
    "hat",
    "ear_r",
    "neck_l",
    "neck",
    "cloth",
)
NUM_CLASSES = len(NAMES)
INDEX = {name: index for index, name in enumerate(NAMES)}

# Left and right are the subject's own, so mirroring an image exchanges these classes.
LEFT_RIGHT_PAIRS = (("l_eye", "r_eye"), ("l_brow", "r_brow"), ("l_ear", "r_ear"))

# The data set's own visualisation palette, RGB uint8, (NUM_CLASSES, 3).
COLORS = np.array(
    [
        [0, 0, 0],
        [204, 0, 0],
        [76, 153, 0],
        [204, 204, 0],
        [51, 51, 255],
        [204, 0, 204],
        [0, 255, 255],
        [255, 204, 204],
        [102, 51, 0],
        [255, 0, 0],
        [102, 204, 0],
        [255, 255, 0],
        [0, 0, 153],
        [0, 0, 204],
        [255, 51, 153],
        [0, 204, 204],
        [0, 51, 0],
        [255, 153, 51],
        [0, 204, 0],
    ],
    np.uint8,
)


def _mirror_table() -> np.ndarray:
    table = np.arange(NUM_CLASSES, dtype=np.uint8)
    for left, right in LEFT_RIGHT_PAIRS:
        table[[INDEX[left], INDEX[right]]] = table[[INDEX[right], INDEX[left]]]
    return table


_MIRROR = _mirror_table()


def flip_mask(mask: np.ndarray) -> np.ndarray:
    """Mirrors a mask (..., H, W) about the vertical axis and exchanges left and right classes."""
    return _MIRROR[mask[..., ::-1]]


def colorize(mask: np.ndarray) -> np.ndarray:
    """Paints a mask (..., H, W) in the palette: uint8 RGB, (..., H, W, 3)."""
    return COLORS[mask]


def check_mask(mask: np.ndarray, source: str) -> np.ndarray:
    """Returns `mask` as uint8 after checking that every value is a class index.

    Args:
      mask: integer array (..., H, W).
      source: what the mask was read from, for the message.

    Raises:
      InputError: the array is not integer-valued, or holds a value outside 0..18.
    """
    if not np.issubdtype(mask.dtype, np.integer):
        raise InputError(f"{source}: a mask holds integer class indices, got dtype {mask.dtype}.")
    outside = np.unique(mask[(mask < 0) | (mask >= NUM_CLASSES)])
    if outside.size:
        raise InputError(
            f"{source}: label {', '.join(map(str, outside[:5]))} is outside 0..{NUM_CLASSES - 1}; "
            f"a mask holds class indices of CelebAMask-HQ (0 background ... {NUM_CLASSES - 1} {NAMES[-1]}), "
            "not colours or another data set's classes."
        )
    return mask.astype(np.uint8)
