"""A configuration that trains in seconds, and the data it needs."""

from pathlib import Path

from sisma_jax.config import (
    Config,
    DataConfig,
    EvaluateConfig,
    FlowConfig,
    ModelConfig,
    OptimConfig,
    SampleConfig,
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
        sample=SampleConfig(steps=2, batch_size=4),
        evaluate=EvaluateConfig(num_samples=6, segmenter_steps=2, segmenter_width=16),
    )
