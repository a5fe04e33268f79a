"""CelebAMask-HQ at 256 px with SISMA-U-B: as celebamask_hq_256.py, with most blocks at coarser resolutions.

An evaluation takes less than a third of the time of the flat model's (docs/speed.md).
It needs the same files. Run on a TPU VM or a GPU:
    python run.py --config configs/celebamask_hq_256_u.py --data.root=FOLDER --autoencoder.weights=FOLDER
"""

from sisma_jax.config import (
    AutoencoderConfig,
    Config,
    DataConfig,
    EvaluateConfig,
    FlowConfig,
    OptimConfig,
    ParserConfig,
    Sampling,
    TrainConfig,
    preset,
)


def get_config() -> Config:
    """Returns the configuration of CelebAMask-HQ at 256 px with a U."""
    return Config(
        data=DataConfig(name="celebamask_hq", root="CelebAMask-HQ", image_size=256, stored_size=256, num_threads=16),
        autoencoder=AutoencoderConfig(kind="kl", weights="sd-vae-ft-mse"),
        model=preset(
            "U-B",
            patch_size=1,
            patch_overlap=1,
            region_pooling=True,
            modulation="shared",
            remat="dots",
        ),
        flow=FlowConfig(time_mean=0.0, time_std=1.0, mask_dropout=0.1),
        optim=OptimConfig(learning_rate=1e-4, warmup_steps=1_000, ema_decay=0.9999),
        train=TrainConfig(num_steps=400_000, batch_size=64, compute_dtype="bfloat16", checkpoint_every_steps=10_000),
        sample=Sampling(steps=25, guidance=1.5),
        parser=ParserConfig(width=64, num_steps=10_000, batch_size=64),
        evaluate=EvaluateConfig(num_samples=2_000),
    )
