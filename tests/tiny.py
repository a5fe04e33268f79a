"""A configuration that trains in seconds, and the data it needs."""

import dataclasses
from pathlib import Path

from sisma_jax.config import (
    AutoencoderConfig,
    Config,
    DataConfig,
    EvaluateConfig,
    FlowConfig,
    ModelConfig,
    OptimConfig,
    ParserConfig,
    Sampling,
    TrainConfig,
)


def tiny_config(cache_dir: Path, **train: object) -> Config:
    """Drawn faces at 16 px and a model of one block; `train` replaces values of the train section."""
    defaults = {"num_steps": 4, "batch_size": 8, "log_every_steps": 1, "checkpoint_every_steps": 2}
    return Config(
        data=DataConfig(cache_dir=str(cache_dir), image_size=16, num_train=24, num_test=8),
        model=ModelConfig(depth=1, d_model=16, patch_size=4, d_state=4, mlp_ratio=1.0, d_label=8),
        flow=FlowConfig(prediction="data"),
        optim=OptimConfig(learning_rate=1e-3, ema_decay=0.9),
        train=TrainConfig(**(defaults | train)),
        sample=Sampling(steps=2, batch_size=4),
        parser=ParserConfig(width=8, num_steps=2, batch_size=8, checkpoint_every_steps=2),
        evaluate=EvaluateConfig(num_samples=6, diversity_masks=6, samples_per_mask=4),
    )


def tiny_latent_config(cache_dir: Path, **values: object) -> Config:
    """The same in the latents, 8 x 8, of an autoencoder that it first trains; `values` replaces whole sections."""
    autoencoder = AutoencoderConfig(
        kind="kl",
        block_channels=(4, 8),
        layers_per_block=1,
        norm_groups=4,
        num_steps=4,
        checkpoint_every_steps=2,
        encode_batch_size=8,
    )
    config = dataclasses.replace(tiny_config(cache_dir), autoencoder=autoencoder, flow=FlowConfig())
    return dataclasses.replace(config, **values)
