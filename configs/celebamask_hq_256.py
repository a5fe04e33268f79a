"""CelebAMask-HQ at 256 px, as in related work: SISMA-B on the latents of Stable Diffusion's autoencoder.

Needs the official download of CelebAMask-HQ, and config.json and diffusion_pytorch_model.safetensors of
https://huggingface.co/stabilityai/sd-vae-ft-mse in one folder. Run on a TPU VM or a GPU (requirements-tpu.txt or
requirements-cuda.txt):
    python run.py --config configs/celebamask_hq_256.py --data.root=FOLDER --autoencoder.weights=FOLDER

An image has 1,024 tokens. Times, optimizer and EMA are those of the public code of U-Shape Mamba, except for the batch
size, which is 8 per process there. Region pooling, overlapping patches and one modulation are better in small models
(docs/ablation.md) and have not been tried at this size. There, --optim.name=muon with a higher rate was better, too;
docs/plan.md has its cost.

Cost on v5e-16 with --mesh.fsdp=16 (docs/plan.md): no step is shorter than 35 ms, so the run takes 3.9 hours at least.
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
    """Returns the configuration of CelebAMask-HQ at 256 px."""
    return Config(
        data=DataConfig(name="celebamask_hq", root="CelebAMask-HQ", image_size=256, stored_size=256, num_threads=16),
        autoencoder=AutoencoderConfig(kind="kl", weights="sd-vae-ft-mse"),
        model=preset(
            "B",
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
