"""The schema of an experiment: one frozen dataclass per section, checked when it is made.

A field states its default, its range and whether it may change when a run resumes, all in `schema.value`. The command
line overrides single values; `config_files.py` reads and writes whole configurations.
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
    """Where examples come from and the form in which they reach the device."""

    section: ClassVar[str] = "data"

    name: Literal["synthetic_faces", "celebamask_hq"] = "synthetic_faces"
    classes: ClassSet = CELEBAMASK_HQ
    """The semantic classes: a name known to the program, or a JSON file of names and colours."""
    root: str = value("", may_change=True)
    """Folder of the raw download (celebamask_hq only); a host that has a copy of the shards can do without it."""
    cache_dir: str = value("data", may_change=True)
    """Folder of the prepared array_record shards, or gs://BUCKET/... with a copy of one."""
    stored_size: int = value(0, NON_NEGATIVE)
    """Side in pixels at which shards hold larger faces, re-encoded; 0: as their files are (celebamask_hq only)."""
    skip_damaged: bool = value(False, may_change=True)
    """Leave out faces whose files are damaged or missing, and report which (celebamask_hq only)."""
    image_size: int = value(64, Range(8, 2048))
    """Height and width of a training image in pixels."""
    split: Literal["by_id", "celeba"] = "by_id"
    """by_id: the last `num_test` ids are the test split; celeba: by the CelebA mapping file."""
    num_train: int = value(4096, COUNT)
    """Number of training faces to draw (synthetic_faces only)."""
    num_test: int = value(2000, COUNT)
    """Number of test faces: the last ids of celebamask_hq, or the number drawn by synthetic_faces."""
    flip: bool = True
    """Mirror half of the training examples, with left and right classes exchanged."""
    num_threads: int = value(4, COUNT, may_change=True)
    """Threads that decode ahead of the training step."""

    def _check(self) -> None:
        self._require(
            self.stored_size == 0 or self.stored_size >= self.image_size,
            "stored_size",
            f"0 or no less than data.image_size, {self.image_size}",
        )
        if self.name == "synthetic_faces" and self.classes != CELEBAMASK_HQ:
            raise InputError("data.classes: synthetic_faces are drawn with the classes of CelebAMask-HQ, no others.")
        if self.name == "celebamask_hq" and not self.root:
            raise InputError(
                "data.root is empty: name the folder of the CelebAMask-HQ download, the one that holds "
                "CelebA-HQ-img/ and CelebAMask-HQ-mask-anno/ (or images/ and labels/)."
            )


@dataclasses.dataclass(frozen=True)
class ModelConfig(Section):
    """The SISMA denoiser. `d_inner`, `dt_rank` follow from the fields as in Mamba (arXiv 2312.00752)."""

    section: ClassVar[str] = "model"

    backbone: Literal["sisma", "dit"] = "sisma"
    """What mixes tokens and reads the mask; dit: the attention baseline, with self-attention for Self-Mamba and
    cross-attention for Cross-Mamba."""
    depth: int = value(12, COUNT)
    """Number of blocks; in a U, of those at its bottom."""
    level_depths: tuple[int, ...] = value((), COUNT)
    """Makes the stack a U (arXiv 2504.13499): blocks on the way down, and as many on the way up, at each resolution
    from the finest on; every level halves the token grid. Empty: a flat stack, as in the paper."""
    d_model: int = value(768, COUNT)
    """Channels of a token."""
    patch_size: Literal[1, 2, 4, 8] = 2
    """Side of the latent patch that makes one token."""
    d_state: int = value(16, COUNT)
    """State dimension N of the selective scan."""
    expand: int = value(2, COUNT)
    """d_inner / d_model."""
    d_conv: int = value(3, COUNT)
    """Side of the depthwise convolution's kernel."""
    mlp_ratio: float = value(4.0, NON_NEGATIVE)
    """Hidden width of the feed-forward over d_model; 0 leaves it out."""
    orders_per_layer: Literal[1, 2, 4] = 1
    """Scan orders that one mixer runs and sums."""
    order_rotation: Literal["interleaved", "grouped"] = "interleaved"
    """How the orders follow each other from layer to layer: rows and columns in turn, or four along rows, then four
    along columns (as U-Shape Mamba's public weights want)."""
    mixer_skip: bool = False
    """Adds Self-Mamba's input, times a learned scale, to its output (as U-Shape Mamba's public weights want)."""
    learned_positions: int = value(0, NON_NEGATIVE)
    """Side of the token grid that has learned positions; 0: fixed sines and cosines, for grids of any size."""
    mask_conditioning: Literal["cross", "spade", "concat"] = "cross"
    """How the mask enters: by Cross-Mamba (or cross-attention), by spatially adaptive normalisation in its place, or
    concatenated with the tokens before the first block."""
    cross_wiring: Literal["state_from_mask", "readout_from_mask"] = "state_from_mask"
    """state_from_mask: Δ and B from the mask, C from the image; readout_from_mask: Δ and B from the image, C from
    the mask. The scan's input u comes from the mask in both."""
    d_label: int = value(32, COUNT)
    """Channels of the label embedding at image resolution in the mask encoder."""
    scan_implementation: Literal["auto", "pallas_tpu", "pallas_gpu", "xla", "associative", "reference"] = value(
        "auto", may_change=True
    )
    """Which selective scan; auto is the fastest that this machine's devices have. Results agree to rounding."""
    remat: Literal["none", "dots", "full"] = value("none", may_change=True)
    """What the backward pass recomputes to save memory: nothing, all but the matrix products, or all of a block."""

    def _check(self) -> None:
        self._require(self.d_conv % 2 == 1, "d_conv", "odd")
        self._require(self.d_model % 4 == 0, "d_model", "a multiple of 4 (2-D position embedding)")


# Depth and width of DiT's S, B, L and XL (arXiv 2212.09748), the sizes that diffusion backbones are compared at. The U
# of a size is a block deeper and three resolutions high, as in U-Shape Mamba, but with most of its blocks at the coarse
# ones, where a token costs as much and there are fewer.
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
    """Returns the model of a preset size, with single values replaced.

    Raises:
      InputError: there is no such preset.
    """
    if name not in PRESETS:
        raise InputError(f"there is no preset {name!r}; the presets are {', '.join(PRESETS)}.")
    return ModelConfig(**(PRESETS[name] | values))


@dataclasses.dataclass(frozen=True)
class AutoencoderConfig(Section):
    """What turns images into the latents that the denoiser works on, and how it is trained if it is not given."""

    section: ClassVar[str] = "autoencoder"

    kind: Literal["identity", "kl"] = "identity"
    """identity: the denoiser works on pixels; kl: the autoencoder of Stable Diffusion (arXiv 2112.10752)."""
    # What the weights hold may not change: it is compared with what the run began with.
    weights: str = value("", may_change=True)
    """Folder or .safetensors file in the format of diffusers; empty: the run first trains an autoencoder of its own."""
    latent_channels: int = value(4, COUNT)
    block_channels: tuple[int, ...] = value((128, 256, 512, 512), COUNT)
    """Channels of each resolution, that of the image first; each after it halves the resolution."""
    layers_per_block: int = value(2, COUNT)
    """Residual blocks per resolution (given weights tell by themselves)."""
    norm_groups: int = value(32, COUNT)
    """Groups of channels that are normalised together (given weights tell by themselves)."""
    encode_batch_size: int = value(16, COUNT, may_change=True)
    """Images that are encoded together when latents are cached."""
    num_steps: int = value(2_000, COUNT)
    """Training steps; this and what follows count only without given weights."""
    batch_size: int = value(8, COUNT)
    learning_rate: float = value(1e-3, POSITIVE)
    ema_decay: float = value(0.999, DECAY)
    checkpoint_every_steps: int = value(500, COUNT, may_change=True)

    def _check(self) -> None:
        divided = self.weights or all(width % self.norm_groups == 0 for width in self.block_channels)
        self._require(
            bool(self.block_channels) and bool(divided),
            "block_channels",
            f"multiples of autoencoder.norm_groups, {self.norm_groups}",
        )

    @property
    def channels(self) -> int:
        """Channels of a latent."""
        return 3 if self.kind == "identity" else self.latent_channels

    @property
    def downsampling(self) -> int:
        """Image pixels along the side of a latent position."""
        return 1 if self.kind == "identity" else 2 ** (len(self.block_channels) - 1)


@dataclasses.dataclass(frozen=True)
class FlowConfig(Section):
    """Flow matching (arXiv 2209.03003, 2210.02747) and classifier-free guidance (arXiv 2207.12598)."""

    section: ClassVar[str] = "flow"

    prediction: Literal["velocity", "data"] = "velocity"
    """What the network's output means. `data` is turned into a velocity for the loss (arXiv 2511.13720): in
    pixel space the data lie on a far smaller manifold than the velocity, so a narrow network learns it sooner."""
    time_mean: float = 0.0
    """t = sigmoid(Normal(time_mean, time_std)); t = 0 is noise, t = 1 is data. Less log(s) is a time shift of s."""
    time_std: float = value(1.0, POSITIVE)
    mask_dropout: float = value(0.1, DECAY)
    """Probability that an example trains without its mask."""


@dataclasses.dataclass(frozen=True)
class OptimConfig(Section):
    """AdamW with clipping by global norm, linear warm-up and an optional cosine decay."""

    section: ClassVar[str] = "optim"

    name: Literal["adamw"] = "adamw"
    """The optimizer; see `training/optimizers.py`."""
    learning_rate: float = value(1e-4, POSITIVE)
    """The rate after warm-up, at batches of base_batch_size if there is a scaling rule."""
    scaling_rule: Literal["none", "linear", "sqrt"] = "none"
    """How the rate grows with train.batch_size / base_batch_size: not, in proportion (arXiv 1706.02677), or with its
    square root, as suits Adam (arXiv 2205.10287)."""
    base_batch_size: int = value(256, COUNT)
    """Batch for which learning_rate is meant; counts only with a scaling rule."""
    warmup_steps: int = value(0, NON_NEGATIVE)
    decay_steps: int = value(0, NON_NEGATIVE)
    """Step at which a cosine decay reaches zero; 0 keeps the rate constant after warm-up."""
    b1: float = value(0.9, DECAY)
    """Decay of the gradient's running mean."""
    b2: float = value(0.999, DECAY)
    """Decay of the running mean of its square."""
    weight_decay: float = value(0.0, NON_NEGATIVE)
    clip_norm: float = value(1.0, POSITIVE)
    """Global gradient norm above which gradients are scaled down."""
    ema_decay: float = value(0.9999, DECAY)

    def _check(self) -> None:
        self._require(
            self.decay_steps == 0 or self.decay_steps > self.warmup_steps,
            "decay_steps",
            "0 or more than optim.warmup_steps",
        )


@dataclasses.dataclass(frozen=True)
class MeshConfig(Section):
    """How all devices of all processes share the work; see `parallel/sharding.py`."""

    section: ClassVar[str] = "mesh"

    data: int = value(0, NON_NEGATIVE, may_change=True)
    """Data-parallel replicas, each with its share of the batch; 0: as many as the other axes leave devices for."""
    fsdp: int = value(1, COUNT, may_change=True)
    """Devices over which parameters, EMA and optimizer state are sharded, and the batch too."""
    seq: int = value(1, COUNT, may_change=True)
    """Devices over which the rows of each image are sharded: for images beyond one device's memory."""


@dataclasses.dataclass(frozen=True)
class TrainConfig(Section):
    """The training loop."""

    section: ClassVar[str] = "train"

    num_steps: int = value(400_000, COUNT, may_change=True)
    batch_size: int = value(64, COUNT)
    """Examples per step, over all devices and processes."""
    accumulate_steps: int = value(1, COUNT)
    """Parts of a batch whose gradients are computed one after the other and summed: less memory, the same update."""
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of matrix products and activations; parameters, norms and scan carries stay float32."""
    init_from: str = value("", may_change=True)
    """A file that the command `export` wrote, from whose parameters a new run of the same model begins."""
    seed: int = value(0, SEED)
    log_every_steps: int = value(50, COUNT, may_change=True)
    checkpoint_every_steps: int = value(5_000, COUNT, may_change=True)
    keep_checkpoints: int = value(3, COUNT, may_change=True)
    """Newest checkpoints that are kept."""
    keep_best: int = value(1, NON_NEGATIVE, may_change=True)
    """Checkpoints with the lowest held-out loss that are kept besides."""
    max_skipped_steps: int = value(10, NON_NEGATIVE, may_change=True)
    """Steps in a row that may be skipped because loss, gradient or update is not finite; one more stops the run."""
    profile_steps: str = value("", may_change=True)
    """Steps of which a trace is written to WORKDIR/profile, such as 10-15, for TensorBoard or XProf."""

    def _check(self) -> None:
        self._require(
            self.batch_size % self.accumulate_steps == 0,
            "batch_size",
            f"a multiple of train.accumulate_steps, {self.accumulate_steps}",
        )
        self._require(self.profiled is not None, "profile_steps", "empty, or a first and a last step such as 10-15")

    @property
    def profiled(self) -> range | None:
        """Steps whose trace is wanted; None if `profile_steps` cannot be read."""
        if not self.profile_steps:
            return range(0)
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", self.profile_steps)
        steps = match and range(int(match[1]), int(match[2] or match[1]) + 1)
        return steps if steps and steps[0] > 0 else None


@dataclasses.dataclass(frozen=True)
class Sampling(Section):
    """How to sample: the configuration's defaults, of which a call may override each.

    A pytree for `jax.jit` (registered in `diffusion/sampling.py`): `steps`, `solver` and `is_guided` are static, the
    other settings are traced, and `batch_size` and `seed`, which concern the caller alone, are left out.
    """

    section: ClassVar[str] = "sample"

    steps: int = value(25, COUNT, may_change=True)
    """Solver steps from noise to data."""
    solver: Solver = value("euler", may_change=True)
    """euler: order 1; adams_bashforth: order 2 at one function evaluation per step; heun, midpoint: at two."""
    # Beyond these bounds float32 no longer tells the first or last times of a long grid apart.
    shift: float = value(1.0, Range(0.01, 100), may_change=True)
    """Above 1, more of the steps near noise, as high resolutions want (arXiv 2403.03206, eq. 23); 1: equal steps."""
    # Beyond this bound every pixel is black or white: the image is undefined.
    guidance: float = value(1.5, Range(0, 100), may_change=True)
    """Classifier-free guidance scale; 1 is the plain conditional model."""
    guidance_low: float = value(0.0, FRACTION, may_change=True)
    """First time that is guided (t = 0 is noise); what comes before follows the mask unguided (arXiv 2404.07724)."""
    guidance_high: float = value(1.0, FRACTION, may_change=True)
    """Time from which on nothing is guided any more."""
    guidance_rescale: float = value(0.0, FRACTION, may_change=True)
    """How far guided contrast is brought back to what it is unguided (arXiv 2305.08891), from 0 (not) to 1 (all)."""
    batch_size: int = value(16, COUNT, may_change=True)
    """Images per call of the jitted sampler."""
    seed: int = value(0, SEED, may_change=True)

    def _check(self) -> None:
        self._require(
            self.guidance_low <= self.guidance_high,
            "guidance_high",
            f"in [guidance_low, 1] = [{self.guidance_low}, 1]",
        )

    @property
    def is_guided(self) -> bool:
        """Whether the network is also evaluated without the mask. A traced guidance always asks for it."""
        is_known = isinstance(self.guidance, int | float)
        return not is_known or (self.guidance != 1 and self.guidance_low < self.guidance_high)


@dataclasses.dataclass(frozen=True)
class EvaluateConfig(Section):
    """What is measured on held-out data at the end."""

    section: ClassVar[str] = "evaluate"

    num_samples: int = value(256, COUNT, may_change=True)
    """Held-out masks to sample for the mask agreement (at most the size of the test split)."""
    segmenter_steps: int = value(600, COUNT, may_change=True)
    """Training steps of the small segmenter that reads masks back from images."""
    segmenter_width: int = value(32, COUNT, may_change=True)
    """Channels of the segmenter's first level."""


@dataclasses.dataclass(frozen=True)
class Config:
    """One experiment."""

    data: DataConfig = DataConfig()
    autoencoder: AutoencoderConfig = AutoencoderConfig()
    model: ModelConfig = ModelConfig()
    flow: FlowConfig = FlowConfig()
    optim: OptimConfig = OptimConfig()
    mesh: MeshConfig = MeshConfig()
    train: TrainConfig = TrainConfig()
    sample: Sampling = Sampling()
    evaluate: EvaluateConfig = EvaluateConfig()

    def __post_init__(self) -> None:
        size, model = self.data.image_size, self.model
        multiple = self.autoencoder.downsampling * model.patch_size * 2 ** len(model.level_depths)
        if size % multiple:
            halved = f", whose grid is halved {len(model.level_depths)} times" if model.level_depths else ""
            latent = f" of latents a {self.autoencoder.downsampling}th in size" if self.autoencoder.kind == "kl" else ""
            raise InputError(
                f"data.image_size {size} is not a multiple of {multiple}: patches of model.patch_size "
                f"{model.patch_size}{latent}{halved}; choose a size that they tile."
            )

    @property
    def learning_rate(self) -> float:
        """The learning rate after warm-up, by the scaling rule."""
        ratio = self.train.batch_size / self.optim.base_batch_size
        return self.optim.learning_rate * {"none": 1.0, "linear": ratio, "sqrt": ratio**0.5}[self.optim.scaling_rule]

    @property
    def token_rows(self) -> int:
        """Rows of the grid of tokens, in a U of its coarsest."""
        levels = len(self.model.level_depths)
        return self.data.image_size // (self.autoencoder.downsampling * self.model.patch_size * 2**levels)
