"""CelebAMask-HQ at 512 px: as celebamask_hq_256.py, which lists the files it needs, with four times as many latents.

Run on a TPU VM or a GPU:
    python run.py --config configs/celebamask_hq_512.py --data.root=FOLDER --autoencoder.weights=FOLDER

With patches of 2 x 2 latents, an image has 1,024 tokens, as at 256 px. With more latents per face, the same noise hides
less of the face. Therefore times are shifted towards noise by sqrt(4) (arXiv 2403.03206, eq. 23): in training by
`time_mean`, and in sampling by `shift`.
"""

import math

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

SHIFT = 2.0
"""Time shift relative to 256 px: the square root of the ratio of the numbers of latents."""


def get_config() -> Config:
    """Returns the configuration of CelebAMask-HQ at 512 px."""
    return Config(
        data=DataConfig(name="celebamask_hq", root="CelebAMask-HQ", image_size=512, stored_size=512, num_threads=16),
        autoencoder=AutoencoderConfig(kind="kl", weights="sd-vae-ft-mse"),
        model=preset(
            "B",
            patch_size=2,
            patch_overlap=1,
            region_pooling=True,
            modulation="shared",
            remat="dots",
        ),
        flow=FlowConfig(time_mean=-math.log(SHIFT), time_std=1.0, mask_dropout=0.1),
        optim=OptimConfig(learning_rate=1e-4, warmup_steps=1_000, ema_decay=0.9999),
        train=TrainConfig(num_steps=400_000, batch_size=64, compute_dtype="bfloat16", checkpoint_every_steps=10_000),
        sample=Sampling(steps=25, guidance=1.5, shift=SHIFT),
        parser=ParserConfig(width=64, num_steps=10_000, batch_size=64),
        evaluate=EvaluateConfig(num_samples=2_000),
    )
