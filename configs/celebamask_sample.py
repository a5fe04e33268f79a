"""Real faces at 64 px, in pixel space: a folder of a few thousand CelebAMask-HQ images and label maps.

Cost: about an hour on 2 CPU cores. Run:
    python run.py --config configs/celebamask_sample.py --data.root=FOLDER
where FOLDER holds images/ID.jpg and labels/ID.png, or the official download.
"""

from sisma_jax.config import (
    Config,
    DataConfig,
    EvaluateConfig,
    FlowConfig,
    ModelConfig,
    OptimConfig,
    Sampling,
    TrainConfig,
)


def get_config() -> Config:
    return Config(
        data=DataConfig(name="celebamask_hq", root="celebamask_sample", image_size=64, num_test=300),
        model=ModelConfig(depth=4, d_model=128, patch_size=4, d_state=8, expand=1, mlp_ratio=2.0, d_label=16),
        flow=FlowConfig(prediction="data"),
        optim=OptimConfig(learning_rate=1e-3, warmup_steps=100, decay_steps=3000, ema_decay=0.998),
        train=TrainConfig(num_steps=3000, batch_size=16, log_every_steps=50, checkpoint_every_steps=500),
        sample=Sampling(steps=25, guidance=1.5),
        evaluate=EvaluateConfig(num_samples=64, segmenter_steps=600),
    )
