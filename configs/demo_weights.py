r"""The model for the package (`sisma_jax.load("demo")`): the demo's, trained for longer on more drawn faces.

Cost: about an hour on 2 CPU cores by the time of a step, half of it for flow matching, from which the mean flow
starts. Run:
    python run.py --config configs/demo_weights.py --workdir runs/demo_flow train --flow.objective=flow_matching \
        --flow.adaptive_weights --train.num_steps=5000 --optim.decay_steps=5000
    python run.py --workdir runs/demo_flow export --out runs/demo_flow.safetensors
    python run.py --config configs/demo_weights.py --train.init_from=runs/demo_flow.safetensors
"""

import dataclasses
from pathlib import Path

from sisma_jax import config_files
from sisma_jax.config import Config, ParserConfig


def get_config() -> Config:
    """Returns the configuration of the demo with more data and steps."""
    demo = config_files.load(Path(__file__).with_name("demo.py"))
    num_steps = 4_500
    return dataclasses.replace(
        demo,
        data=dataclasses.replace(demo.data, num_train=20_000, num_test=500),
        optim=dataclasses.replace(demo.optim, warmup_steps=200, decay_steps=num_steps, ema_decay=0.999),
        train=dataclasses.replace(demo.train, num_steps=num_steps, log_every_steps=100, checkpoint_every_steps=500),
        parser=ParserConfig(num_steps=3_000),
        evaluate=dataclasses.replace(demo.evaluate, num_samples=500, diversity_masks=32),
    )
