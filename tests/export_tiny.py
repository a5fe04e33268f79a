"""Writes an exported file of a tiny model for images of 16 px: `python -m tests.export_tiny FILE`."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from sisma_jax.data.location_prior import LocationPrior
from sisma_jax.models import face_parser
from sisma_jax.models.factory import init_params
from sisma_jax.runs.export import export_params
from tests.tiny import tiny_config


def export_tiny(file: Path, prior: LocationPrior | None = None) -> None:
    """Writes the file, whose folder exists: random parameters, so that masks and seeds matter, and a face parser."""
    config, rng = tiny_config(Path("data")), np.random.default_rng(0)
    abstract = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    params = jax.tree.map(lambda x: jnp.asarray(0.3 * rng.standard_normal(x.shape), x.dtype), abstract)
    classes, width = config.data.classes, config.parser.width
    parser = face_parser.FaceParser(
        face_parser.make_graph(width, len(classes)),
        face_parser.init_params(jax.random.key(1), width, len(classes)),
        classes,
        config.data.image_size,
    )
    export_params(file, config, 4, params, mask_prior=prior, parser=parser)


if __name__ == "__main__":
    export_tiny(Path(sys.argv[1]))
