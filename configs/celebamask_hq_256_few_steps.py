"""CelebAMask-HQ at 256 px in one or two evaluations per face: a mean flow of SISMA-U-B.

It needs the same files as celebamask_hq_256.py. Run on a TPU VM or a GPU:
    python run.py --config configs/celebamask_hq_256_few_steps.py --data.root=FOLDER --autoencoder.weights=FOLDER

A step takes about 1.6 times as long as one of flow matching. Textures are better if it starts from a run of
celebamask_hq_256_u.py (docs/ablation.md): export that run and add --train.init_from=FILE.
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
    """Returns the configuration of CelebAMask-HQ at 256 px in one or two evaluations."""
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
        flow=FlowConfig(objective="mean_flow", time_mean=0.0, time_std=1.0, mask_dropout=0.1),
        optim=OptimConfig(learning_rate=1e-4, warmup_steps=1_000, ema_decay=0.9999),
        train=TrainConfig(num_steps=400_000, batch_size=64, compute_dtype="bfloat16", checkpoint_every_steps=10_000),
        sample=Sampling(steps=2, guidance=1.5),
        parser=ParserConfig(width=64, num_steps=10_000, batch_size=64),
        evaluate=EvaluateConfig(num_samples=2_000),
    )
