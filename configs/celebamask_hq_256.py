"""CelebAMask-HQ at 256 px, as the relatives of the paper: SISMA-B on the latents of Stable Diffusion's autoencoder.

Wants the official download of CelebAMask-HQ and the folder of https://huggingface.co/stabilityai/sd-vae-ft-mse with
config.json and diffusion_pytorch_model.safetensors. Run on a TPU VM or a GPU (requirements-tpu.txt or -cuda.txt):
    python run.py --config configs/celebamask_hq_256.py --data.root=FOLDER --autoencoder.weights=FOLDER

1,024 tokens. The settings are those of U-Shape Mamba's public code, but for the batch, which there is 8 a process.
"""

from sisma_jax.config import (
    AutoencoderConfig,
    Config,
    DataConfig,
    EvaluateConfig,
    FlowConfig,
    OptimConfig,
    Sampling,
    TrainConfig,
    preset,
)


def get_config() -> Config:
    return Config(
        data=DataConfig(name="celebamask_hq", root="CelebAMask-HQ", image_size=256, stored_size=256, num_threads=16),
        autoencoder=AutoencoderConfig(kind="kl", weights="sd-vae-ft-mse"),
        model=preset("B", patch_size=1, remat="dots"),
        flow=FlowConfig(time_mean=0.0, time_std=1.0, mask_dropout=0.1),
        optim=OptimConfig(learning_rate=1e-4, warmup_steps=1_000, ema_decay=0.9999),
        train=TrainConfig(num_steps=400_000, batch_size=64, compute_dtype="bfloat16", checkpoint_every_steps=10_000),
        sample=Sampling(steps=25, guidance=1.5),
        evaluate=EvaluateConfig(num_samples=2_000, segmenter_steps=10_000, segmenter_width=64),
    )
