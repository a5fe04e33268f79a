"""Writes an exported file of a tiny model, untrained, for images of 16 px: `python -m tests.export_tiny FILE`."""

import sys
from pathlib import Path

import jax

from sisma_jax.models.factory import init_params
from sisma_jax.runs.export import export_params
from tests.tiny import tiny_config


def export_tiny(file: Path) -> None:
    """Writes the file, whose folder exists."""
    config = tiny_config(Path("data"))
    export_params(file, config, 4, init_params(config, jax.random.key(0)))


if __name__ == "__main__":
    export_tiny(Path(sys.argv[1]))
