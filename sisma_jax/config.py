"""The schema of an experiment: frozen dataclasses, checked when they are made.

The command line overrides single values (`--model.d_state=8`); `config_files.py` reads and writes whole configurations.
"""

import dataclasses
import re
from typing import Any, Literal, get_args, get_origin, get_type_hints

from sisma_jax.errors import InputError

Solver = Literal["euler", "heun", "midpoint", "adams_bashforth"]


class _Section:
    """A part of the configuration: every value is of its field's type and range, or the section is not made."""

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(type(self)).items():
            value = getattr(self, name)
            if get_origin(hint) is Literal:
                self._require(value in get_args(hint), name, f"one of {', '.join(map(repr, get_args(hint)))}")
            elif get_origin(hint) is tuple:
                if isinstance(value, list):  # as JSON has it
                    object.__setattr__(self, name, tuple(value))
                is_right = isinstance(value, tuple | list) and all(type(x) is get_args(hint)[0] for x in value)
                self._require(is_right, name, f"a tuple of {get_args(hint)[0].__name__}")
            else:
                accepted = (int, float) if hint is float else hint
                is_right = isinstance(value, accepted) and (hint is bool or not isinstance(value, bool))
                self._require(is_right, name, f"of type {hint.__name__}")
        self._check_ranges()

    def _check_ranges(self) -> None:
        """Raises InputError for a value of the right type that makes no sense."""

    def _require(self, condition: bool, name: str, wanted: str) -> None:
        if not condition:
            section = type(self).__name__.removesuffix("Config").lower()
            raise InputError(f"--{section}.{name} must be {wanted}, got {getattr(self, name)!r}.")


@dataclasses.dataclass(frozen=True)
class DataConfig(_Section):
    """Where examples come from and the form in which they reach the device."""

    name: Literal["synthetic_faces", "celebamask_hq"] = "synthetic_faces"
    root: str = ""
    """Folder of the raw download (celebamask_hq only); a host that has a copy of the shards can do without it."""
    cache_dir: str = "data"
    """Folder of the prepared array_record shards, or gs://BUCKET/... with a copy of one."""
    stored_size: int = 0
    """Side in pixels at which shards hold larger faces, re-encoded; 0: as their files are (celebamask_hq only)."""
    skip_damaged: bool = False
    """Leave out faces whose files are damaged or missing, and say which (celebamask_hq only)."""
    image_size: int = 64
    """Height and width of a training image in pixels."""
    split: Literal["by_id", "celeba"] = "by_id"
    """by_id: the last `num_test` ids are the test split; celeba: by the CelebA mapping file."""
    num_train: int = 4096
    """Number of training faces to draw (synthetic_faces only)."""
    num_test: int = 2000
    """Number of test faces: the last ids of celebamask_hq, or the number drawn by synthetic_faces."""
    flip: bool = True
    """Mirror half of the training examples, with left and right classes exchanged."""
    num_threads: int = 4
    """Threads that decode ahead of the training step."""

    def _check_ranges(self) -> None:
        self._require(8 <= self.image_size <= 2048, "image_size", "in 8..2048")
        self._require(
            self.stored_size == 0 or self.stored_size >= self.image_size,
            "stored_size",
            f"0 or no less than data.image_size, {self.image_size}",
        )
        self._require(self.num_train > 0, "num_train", "positive")
        self._require(self.num_test > 0, "num_test", "positive")
        self._require(self.num_threads > 0, "num_threads", "positive")
        if self.name == "celebamask_hq" and not self.root:
            raise InputError(
                "--data.root is empty: name the folder of the CelebAMask-HQ download, the one that holds "
                "CelebA-HQ-img/ and CelebAMask-HQ-mask-anno/ (or images/ and labels/)."
            )


@dataclasses.dataclass(frozen=True)
class ModelConfig(_Section):
    """The SISMA denoiser. `d_inner`, `dt_rank` follow from the fields as in Mamba (arXiv 2312.00752)."""

    backbone: Literal["sisma", "dit"] = "sisma"
    """dit: the attention baseline, with self-attention for Self-Mamba and cross-attention for Cross-Mamba."""
    depth: int = 12
    """Number of blocks; in a U, of those at its bottom."""
    level_depths: tuple[int, ...] = ()
    """Makes the stack a U (arXiv 2504.13499): blocks on the way down, and as many on the way up, at each resolution
    from the finest on; every level halves the token grid. Empty: a flat stack, as in the paper."""
    d_model: int = 768
    """Channels of a token."""
    patch_size: Literal[1, 2, 4, 8] = 2
    """Side of the latent patch that makes one token."""
    d_state: int = 16
    """State dimension N of the selective scan."""
    expand: int = 2
    """d_inner / d_model."""
    d_conv: int = 3
    """Side of the depthwise convolution's kernel."""
    mlp_ratio: float = 4.0
    """Hidden width of the feed-forward over d_model; 0 leaves it out."""
    orders_per_layer: Literal[1, 2, 4] = 1
    """Scan orders that one mixer runs and sums."""
    order_rotation: Literal["interleaved", "grouped"] = "interleaved"
    """How the orders follow each other from layer to layer: rows and columns in turn, or four along rows, then four
    along columns."""
    mixer_skip: bool = False
    """Adds Self-Mamba's input, times a learned scale, to its output, as in U-Shape Mamba."""
    learned_positions: int = 0
    """Side of the token grid that has learned positions; 0: fixed sines and cosines, for grids of any size."""
    d_head: int = 64
    """Channels of an attention head (dit only)."""
    mask_conditioning: Literal["cross", "spade", "concat"] = "cross"
    """How the mask enters: by Cross-Mamba (or cross-attention), by spatially adaptive normalisation in its place, or
    concatenated with the tokens before the first block."""
    cross_wiring: Literal["state_from_mask", "readout_from_mask"] = "state_from_mask"
    """state_from_mask: Δ and B from the mask, C from the image; readout_from_mask: Δ and B from the image, C from
    the mask. The scan's input u comes from the mask in both."""
    d_label: int = 32
    """Channels of the label embedding at image resolution in the mask encoder."""
    scan_implementation: Literal["auto", "pallas_tpu", "pallas_gpu", "xla", "associative", "reference"] = "auto"
    """Which selective scan; auto is the fastest that this machine's devices have. Results agree to rounding."""
    remat: Literal["none", "dots", "full"] = "none"
    """What the backward pass computes again to save memory: nothing, all but the matrix products, or all of a block."""

    def _check_ranges(self) -> None:
        for name in ("depth", "d_model", "d_state", "expand", "d_conv", "d_label"):
            self._require(getattr(self, name) > 0, name, "positive")
        self._require(self.d_conv % 2 == 1, "d_conv", "odd")
        self._require(self.d_model % 4 == 0, "d_model", "a multiple of 4 (2-D position embedding)")
        self._require(all(depth > 0 for depth in self.level_depths), "level_depths", "positive numbers")
        self._require(self.mlp_ratio >= 0, "mlp_ratio", "non-negative")
        self._require(self.learned_positions >= 0, "learned_positions", "non-negative")
        self._require(self.d_head > 0, "d_head", "positive")
        if self.backbone == "dit":
            self._require(self.d_model % self.d_head == 0, "d_model", f"a multiple of d_head, {self.d_head}")


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
class AutoencoderConfig(_Section):
    """What turns images into the latents that the denoiser works on, and how it is trained if it is not given."""

    kind: Literal["identity", "kl"] = "identity"
    """identity: the denoiser works on pixels; kl: the autoencoder of Stable Diffusion (arXiv 2112.10752)."""
    weights: str = ""
    """Folder or .safetensors file in the format of diffusers; empty: the run first trains an autoencoder of its own."""
    latent_channels: int = 4
    block_channels: tuple[int, ...] = (128, 256, 512, 512)
    """Channels of each resolution, that of the image first; each after it halves the resolution."""
    layers_per_block: int = 2
    """Residual blocks a resolution (given weights tell by themselves)."""
    norm_groups: int = 32
    """Groups of channels that are normalised together (given weights tell by themselves)."""
    decode_tile: int = 128
    """Latents of more positions a side are decoded in overlapping tiles of so many."""
    encode_batch_size: int = 16
    """Images that are encoded together when latents are cached."""
    num_steps: int = 2_000
    """Training steps, and what follows likewise: only without given weights."""
    batch_size: int = 8
    learning_rate: float = 1e-3
    ema_decay: float = 0.999
    perceptual_weight: float = 1.0
    """Of the loss on Laplacian pyramids (arXiv 1707.05776), which stands in for a perceptual one, beside the mean
    absolute error of pixels."""
    kl_weight: float = 1e-4
    """Of the divergence from Normal(0, 1), averaged over the latent's values."""
    checkpoint_every_steps: int = 500

    def _check_ranges(self) -> None:
        names = ("latent_channels", "layers_per_block", "norm_groups", "decode_tile", "encode_batch_size", "num_steps")
        for name in (*names, "batch_size", "learning_rate", "checkpoint_every_steps"):
            self._require(getattr(self, name) > 0, name, "positive")
        for name in ("perceptual_weight", "kl_weight"):
            self._require(getattr(self, name) >= 0, name, "non-negative")
        self._require(0 <= self.ema_decay < 1, "ema_decay", "in [0, 1)")
        divided = self.weights or all(width > 0 and width % self.norm_groups == 0 for width in self.block_channels)
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
class FlowConfig(_Section):
    """Flow matching (arXiv 2209.03003, 2210.02747) and classifier-free guidance (arXiv 2207.12598)."""

    prediction: Literal["velocity", "data"] = "velocity"
    """What the network's output means. `data` is turned into a velocity for the loss (arXiv 2511.13720): in
    pixel space the data lie on a far smaller manifold than the velocity, so a narrow network learns it sooner."""
    time_mean: float = 0.0
    """t = sigmoid(Normal(time_mean, time_std)); t = 0 is noise, t = 1 is data. Less log(s) is a time shift of s."""
    time_std: float = 1.0
    mask_dropout: float = 0.1
    """Probability that an example trains without its mask."""

    def _check_ranges(self) -> None:
        self._require(self.time_std > 0, "time_std", "positive")
        self._require(0 <= self.mask_dropout < 1, "mask_dropout", "in [0, 1)")


@dataclasses.dataclass(frozen=True)
class OptimConfig(_Section):
    """AdamW with clipping by global norm, linear warm-up and an optional cosine decay."""

    learning_rate: float = 1e-4
    """The rate after warm-up, at batches of base_batch_size if there is a scaling rule."""
    scaling_rule: Literal["none", "linear", "sqrt"] = "none"
    """How the rate grows with train.batch_size / base_batch_size: not, in proportion (arXiv 1706.02677), or with its
    square root, as suits Adam (arXiv 2205.10287)."""
    base_batch_size: int = 256
    """Batch for which learning_rate is meant; counts only with a scaling rule."""
    warmup_steps: int = 0
    decay_steps: int = 0
    """Step at which a cosine decay reaches zero; 0 keeps the rate constant after warm-up."""
    b1: float = 0.9
    b2: float = 0.999
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    """Global gradient norm above which gradients are scaled down."""
    ema_decay: float = 0.9999

    def _check_ranges(self) -> None:
        self._require(self.learning_rate > 0, "learning_rate", "positive")
        self._require(self.base_batch_size > 0, "base_batch_size", "positive")
        self._require(self.warmup_steps >= 0, "warmup_steps", "non-negative")
        self._require(
            self.decay_steps == 0 or self.decay_steps > self.warmup_steps,
            "decay_steps",
            "0 or more than optim.warmup_steps",
        )
        self._require(self.weight_decay >= 0, "weight_decay", "non-negative")
        self._require(self.clip_norm > 0, "clip_norm", "positive")
        self._require(0 <= self.ema_decay < 1, "ema_decay", "in [0, 1)")


@dataclasses.dataclass(frozen=True)
class MeshConfig(_Section):
    """How all devices of all processes share the work; see `sharding.py`."""

    data: int = 0
    """Copies of the state, each with its part of the batch; 0: as many as the other axes leave devices for."""
    fsdp: int = 1
    """Devices over which parameters, their average and the optimiser's state are split, and the batch too."""
    seq: int = 1
    """Devices over which the rows of each image are split: for images beyond one device's memory."""

    def _check_ranges(self) -> None:
        self._require(self.data >= 0, "data", "non-negative")
        self._require(self.fsdp > 0, "fsdp", "positive")
        self._require(self.seq > 0, "seq", "positive")


@dataclasses.dataclass(frozen=True)
class TrainConfig(_Section):
    """The training loop."""

    num_steps: int = 400_000
    batch_size: int = 64
    """Examples a step, over all devices and processes."""
    accumulate_steps: int = 1
    """Parts of a batch whose gradients are computed one after the other and summed: less memory, the same update."""
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of matrix products and activations; parameters, norms and scan carries stay float32."""
    init_from: str = ""
    """A file that the command `export` wrote, whose parameters a new run of the same model begins with."""
    seed: int = 0
    log_every_steps: int = 50
    checkpoint_every_steps: int = 5_000
    keep_checkpoints: int = 3
    """Newest checkpoints that are kept."""
    keep_best: int = 1
    """Checkpoints with the lowest held-out loss that are kept besides."""
    max_skipped_steps: int = 10
    """Updates in a row that may be skipped because loss or gradient is not finite; one more stops the run."""
    profile_steps: str = ""
    """Steps of which a trace is written to WORKDIR/profile, such as 10-15, for TensorBoard or XProf."""

    def _check_ranges(self) -> None:
        names = ("num_steps", "batch_size", "accumulate_steps", "log_every_steps", "checkpoint_every_steps")
        for name in (*names, "keep_checkpoints"):
            self._require(getattr(self, name) > 0, name, "positive")
        self._require(
            self.batch_size % self.accumulate_steps == 0,
            "batch_size",
            f"a multiple of train.accumulate_steps, {self.accumulate_steps}",
        )
        for name in ("keep_best", "max_skipped_steps"):
            self._require(getattr(self, name) >= 0, name, "non-negative")
        self._require(self.profiled is not None, "profile_steps", "empty, or a first and a last step such as 10-15")
        self._require(0 <= self.seed < 2**32, "seed", "in 0..2**32 - 1")

    @property
    def profiled(self) -> range | None:
        """Steps whose trace is wanted; None if `profile_steps` cannot be read."""
        if not self.profile_steps:
            return range(0)
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", self.profile_steps)
        steps = match and range(int(match[1]), int(match[2] or match[1]) + 1)
        return steps if steps and steps[0] > 0 else None


@dataclasses.dataclass(frozen=True)
class SampleConfig(_Section):
    """Defaults of sampling; a call may override each."""

    steps: int = 25
    """Solver steps from noise to data."""
    solver: Solver = "euler"
    """euler: order 1; adams_bashforth: order 2 at one evaluation of the network a step; heun, midpoint: at two."""
    shift: float = 1.0
    """Above 1, more of the steps near noise, as high resolutions want (arXiv 2403.03206, eq. 23); 1: equal steps."""
    guidance: float = 1.5
    """Classifier-free guidance scale; 1 is the plain conditional model."""
    guidance_low: float = 0.0
    """First time that is guided (t = 0 is noise); what comes before follows the mask unguided (arXiv 2404.07724)."""
    guidance_high: float = 1.0
    """Time from which on nothing is guided any more."""
    guidance_rescale: float = 0.0
    """How far guided contrast is brought back to what it is unguided (arXiv 2305.08891), from 0 (not) to 1 (all)."""
    batch_size: int = 16
    """Images that one call of the jit-ed sampler paints."""
    seed: int = 0

    def _check_ranges(self) -> None:
        self._require(self.steps > 0, "steps", "positive")
        # Beyond these bounds float32 no longer tells the first or last times of a long grid apart.
        self._require(0.01 <= self.shift <= 100, "shift", "in [0.01, 100]")
        self._require(self.guidance >= 0, "guidance", "non-negative")
        self._require(0 <= self.guidance_low <= 1, "guidance_low", "in [0, 1]")
        self._require(
            self.guidance_low <= self.guidance_high <= 1,
            "guidance_high",
            f"in [guidance_low, 1] = [{self.guidance_low}, 1]",
        )
        self._require(0 <= self.guidance_rescale <= 1, "guidance_rescale", "in [0, 1]")
        self._require(self.batch_size > 0, "batch_size", "positive")
        self._require(0 <= self.seed < 2**32, "seed", "in 0..2**32 - 1")


@dataclasses.dataclass(frozen=True)
class EvaluateConfig(_Section):
    """What is measured on held-out data at the end."""

    num_samples: int = 256
    """Held-out masks to paint for the mask agreement (at most the size of the test split)."""
    segmenter_steps: int = 600
    """Training steps of the small segmenter that reads masks back from images."""
    segmenter_width: int = 32
    """Channels of the segmenter's first level."""

    def _check_ranges(self) -> None:
        for field in dataclasses.fields(self):
            self._require(getattr(self, field.name) > 0, field.name, "positive")


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
    sample: SampleConfig = SampleConfig()
    evaluate: EvaluateConfig = EvaluateConfig()

    def __post_init__(self) -> None:
        size, model = self.data.image_size, self.model
        multiple = self.autoencoder.downsampling * model.patch_size * 2 ** len(model.level_depths)
        if size % multiple:
            halved = f", whose grid is halved {len(model.level_depths)} times" if model.level_depths else ""
            latent = f" of latents a {self.autoencoder.downsampling}th in size" if self.autoencoder.kind == "kl" else ""
            raise InputError(
                f"--data.image_size {size} is not a multiple of {multiple}: patches of --model.patch_size "
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
