"""Real faces at 64 px, in pixel space, from a few thousand images and label maps of CelebAMask-HQ.

Cost: about an hour on 2 CPU cores. Run:
    python run.py --config configs/celebamask_sample.py --data.root=FOLDER
where FOLDER contains images/ID.jpg and labels/ID.png, or is the official download.
"""

from sisma_jax.config import (
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


def get_config() -> Config:
    """Returns the configuration of real faces at 64 px."""
    return Config(
        data=DataConfig(name="celebamask_hq", root="celebamask_sample", image_size=64, num_test=300),
        model=ModelConfig(
            depth=4,
            d_model=128,
            patch_size=4,
            patch_overlap=2,
            d_state=8,
            expand=1,
            mlp_ratio=2.0,
            region_pooling=True,
            modulation="shared",
            d_label=16,
        ),
        flow=FlowConfig(prediction="data", adaptive_weights=True),
        optim=OptimConfig(name="muon", learning_rate=4e-3, warmup_steps=100, decay_steps=3000, ema_decay=0.998),
        train=TrainConfig(num_steps=3000, batch_size=16, log_every_steps=50, checkpoint_every_steps=500),
        sample=Sampling(steps=25, guidance=1.5),
        parser=ParserConfig(num_steps=1_500),
        evaluate=EvaluateConfig(num_samples=64),
    )
