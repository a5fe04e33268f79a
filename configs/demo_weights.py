"""The model for the package (`sisma_jax.load("demo")`): the demo's, trained for longer on more drawn faces.

A model of flow matching is trained first, from which the mean flow starts. Cost: two hours on 2 CPU cores (AVX2).
Run:
    make weights
"""

import dataclasses
from pathlib import Path

from sisma_jax import config_files
from sisma_jax.config import Config, ParserConfig


def get_config() -> Config:
    """Returns the configuration of the demo with more data and steps."""
    demo = config_files.load(Path(__file__).with_name("demo.py"))
    return dataclasses.replace(
        demo,
        data=dataclasses.replace(demo.data, num_train=20_000, num_test=500),
        optim=dataclasses.replace(demo.optim, warmup_steps=200, decay_steps=2_500, ema_decay=0.999),
        train=dataclasses.replace(demo.train, num_steps=2_500, log_every_steps=100, checkpoint_every_steps=500),
        parser=ParserConfig(width=16, num_steps=3_000),
        evaluate=dataclasses.replace(demo.evaluate, num_samples=500, diversity_masks=32),
    )
