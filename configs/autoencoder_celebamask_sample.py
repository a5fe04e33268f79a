"""Real faces at 128 px, in the latent space of an autoencoder that the run trains itself: no weights to download.

One command prepares the data, trains the autoencoder (from 128 px to 32 x 32 x 4), caches its latents, trains SISMA on
them, samples and evaluates. Cost: about 90 minutes on 2 CPU cores. Run:
    python run.py --config configs/autoencoder_celebamask_sample.py --data.root=FOLDER
where FOLDER contains images/ID.jpg and labels/ID.png of a few thousand faces, or is the official download. The commands
`autoencoder`, `latents` and `train` run these stages one by one.
"""

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


def get_config() -> Config:
    """Returns the configuration of 128 px with an autoencoder of its own."""
    return Config(
        data=DataConfig(name="celebamask_hq", root="celebamask_sample", image_size=128, stored_size=128, num_test=300),
        autoencoder=AutoencoderConfig(
            kind="kl",
            block_channels=(16, 32, 64),
            layers_per_block=1,
            norm_groups=8,
            num_steps=2_000,
            batch_size=4,
            learning_rate=2e-3,
            ema_decay=0.995,
        ),
        model=ModelConfig(depth=4, d_model=128, patch_size=2, d_state=8, expand=1, mlp_ratio=2.0, d_label=16),
        flow=FlowConfig(prediction="velocity"),
        optim=OptimConfig(learning_rate=1e-3, warmup_steps=100, decay_steps=1_500, ema_decay=0.998),
        train=TrainConfig(num_steps=1_500, batch_size=16, log_every_steps=50, checkpoint_every_steps=250),
        sample=Sampling(steps=25, guidance=1.5),
        parser=ParserConfig(num_steps=1_000),
        evaluate=EvaluateConfig(num_samples=64),
    )
