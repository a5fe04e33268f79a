"""Writes the example masks of the painting page: label maps of drawn faces.

python -m sisma_jax.serving.example_masks
"""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from sisma_jax.data.classes import CELEBAMASK_HQ
from sisma_jax.data.drawing import draw_face

FOLDER = Path(__file__).parent / "static" / "examples"
SIZE = 256
# The faces were chosen by eye among the first sixty of this seed.
_SEED = 5
_FACES = {
    "Long hair": 3,
    "Short hair": 31,
    "Glasses": 30,
    "Fringe": 50,
    "Hat": 36,
    "Earrings": 47,
    "No hair": 19,
    "Necklace": 57,
}


def example_mask(name: str) -> np.ndarray:
    """Returns an example, uint8 class indices of CelebAMask-HQ (256, 256).

    Args:
      name: of the example, as the page shows it.
    """
    return draw_face((_SEED, _FACES[name]), SIZE)[1]


def file_name(name: str) -> str:
    """Returns the name of an example's file."""
    return f"{name.lower().replace(' ', '_')}.png"


def listing() -> dict[str, object]:
    """Returns what `examples.json` says: the names of the classes, and each example's file and name."""
    return {
        "names": list(CELEBAMASK_HQ.names),
        "examples": [{"file": file_name(name), "name": name} for name in _FACES],
    }


def write(folder: Path = FOLDER) -> None:
    """Writes one PNG file of class indices per example, and `examples.json`, which lists them."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in _FACES:
        Image.fromarray(example_mask(name)).save(folder / file_name(name), optimize=True)
    (folder / "examples.json").write_text(f"{json.dumps(listing(), indent=2)}\n")


if __name__ == "__main__":
    write()
