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
    """Returns an example, uint8 class indices of CelebAMask-HQ (256, 256)."""
    return draw_face((_SEED, _FACES[name]), SIZE)[1]


def write(folder: Path = FOLDER) -> None:
    """Writes one PNG file of class indices per example, and `examples.json`, which lists them with their classes."""
    folder.mkdir(parents=True, exist_ok=True)
    examples = [{"file": f"{name.lower().replace(' ', '_')}.png", "name": name} for name in _FACES]
    for example in examples:
        Image.fromarray(example_mask(example["name"])).save(folder / example["file"], optimize=True)
    listed = {"names": CELEBAMASK_HQ.names, "examples": examples}
    (folder / "examples.json").write_text(f"{json.dumps(listed, indent=2)}\n")


if __name__ == "__main__":
    write()
