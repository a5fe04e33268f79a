"""The demo: drawn faces at 64 px, in pixel space, with a mean flow that trains on two CPU cores.

Cost: about six minutes on 2 CPU cores, four of them for training the denoiser. Run:
    python run.py --config configs/demo.py

A face takes one or two evaluations of the network, with guidance inside. docs/ablation.md compares the choices.
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
    """Returns the configuration of the demo."""
    return Config(
        data=DataConfig(name="synthetic_faces", image_size=64, num_train=2048, num_test=128),
        model=ModelConfig(
            depth=4,
            d_model=128,
            patch_size=4,
            patch_overlap=3,
            d_state=4,
            expand=1,
            mlp_ratio=2.0,
            region_pooling=True,
            modulation="shared",
            d_label=16,
        ),
        flow=FlowConfig(objective="mean_flow", prediction="data"),
        optim=OptimConfig(name="muon", learning_rate=4e-3, warmup_steps=30, decay_steps=330, ema_decay=0.99),
        train=TrainConfig(num_steps=330, batch_size=16, log_every_steps=10, checkpoint_every_steps=110),
        sample=Sampling(steps=2, guidance=1.5),
        parser=ParserConfig(num_steps=600),
        evaluate=EvaluateConfig(num_samples=48, diversity_masks=8, samples_per_mask=4),
    )
