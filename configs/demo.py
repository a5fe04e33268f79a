"""The demo: drawn faces at 64 px, in pixel space, small enough for two CPU cores.

Cost: a few minutes on 2 cores. Run: python run.py --config configs/demo.py
"""

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


def get_config() -> Config:
    return Config(
        data=DataConfig(name="synthetic_faces", image_size=64, num_train=4096, num_test=256),
        model=ModelConfig(depth=4, d_model=128, patch_size=4, d_state=8, expand=2, mlp_ratio=2.0, d_label=16),
        flow=FlowConfig(prediction="data", mask_dropout=0.1),
        optim=OptimConfig(learning_rate=2e-3, warmup_steps=50, decay_steps=600, ema_decay=0.99),
        train=TrainConfig(num_steps=600, batch_size=16, log_every_steps=20, checkpoint_every_steps=200),
        sample=SampleConfig(steps=20, guidance=1.5),
        evaluate=EvaluateConfig(num_samples=64, segmenter_steps=400),
    )
