"""Autoencoders, which convert between images and the latents of the denoiser.

`IdentityAutoencoder` uses the pixels as latents. `KlAutoencoder` is the KL autoencoder of Stable Diffusion (Rombach et
al., arXiv 2112.10752) with channels last. Its modules have the same names as in the package diffusers, so that
`kl_weights.py` can load public weights by name.
"""

import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key, UInt8

Image = Float[Array, "B H W 3"]
Latent = Float[Array, "B h w C"]
Features = Float[Array, "B H W D"]

NORM_EPSILON = 1e-6
# Log variances are clipped to this range, as in diffusers.
LOG_VARIANCE_RANGE = (-30.0, 20.0)
# Larger latents are decoded in tiles of this side, in latent positions: 1024 px at the usual downsampling of 8.
DECODE_TILE = 128


def from_uint8(image: UInt8[Array, "B H W 3"]) -> Image:
    """Returns 8-bit images as float32 in [-1, 1]."""
    return image.astype(jnp.float32) / 127.5 - 1.0


def to_uint8(image: Image) -> UInt8[Array, "B H W 3"]:
    """Returns float images, nominally in [-1, 1], as 8-bit images; values outside this range are clipped."""
    return jnp.round(jnp.clip((image + 1.0) * 127.5, 0.0, 255.0)).astype(jnp.uint8)


class IdentityAutoencoder(nnx.Module):
    """Uses the image itself as its latent.

    Attributes:
      channels: number of channels of a latent.
      downsampling: side of an image in pixels, divided by the side of its latent.
    """

    channels = 3
    downsampling = 1

    def encode(self, image: Image) -> Image:
        """Returns the images, float32 in [-1, 1], unchanged."""
        return image

    def decode(self, latent: Image) -> Image:
        """Returns the latents unchanged, as images that are nominally in [-1, 1]."""
        return latent


@dataclasses.dataclass(frozen=True)
class KlConfig:
    """Sizes of a KL autoencoder. The defaults are those of Stable Diffusion 1 and 2.

    Attributes:
      latent_channels: channels of a latent; 16 in Stable Diffusion 3 and FLUX.
      block_channels: channels per level, starting at the image's resolution; each further level halves the resolution.
      layers_per_block: residual blocks per level of the encoder; a level of the decoder has one more.
      norm_groups: number of groups in group normalisation.
      has_quant_conv: whether a 1x1 convolution follows the encoder and another one precedes the decoder.
      scale: factor of the latents, scale (x - shift), where x is the encoder's output. It makes their variance about 1.
      shift: offset of the latents, in the same formula.
    """

    latent_channels: int = 4
    block_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    norm_groups: int = 32
    has_quant_conv: bool = True
    scale: float = 0.18215
    shift: float = 0.0

    @property
    def downsampling(self) -> int:
        """Side of an image in pixels, divided by the side of its latent."""
        return 2 ** (len(self.block_channels) - 1)


def _conv(
    channels_in: int,
    channels_out: int,
    size: int,
    rngs: nnx.Rngs,
    *,
    strides: int = 1,
    padding: str | tuple[tuple[int, int], ...] = "SAME",
) -> nnx.Conv:
    return nnx.Conv(channels_in, channels_out, (size, size), strides=strides, padding=padding, rngs=rngs)


class _ResidualBlock(nnx.Module):
    """Computes x + Conv(SiLU(GN(Conv(SiLU(GN(x)))))) with 3x3 convolutions."""

    def __init__(self, channels_in: int, channels_out: int, groups: int, *, rngs: nnx.Rngs):
        self.norm1 = nnx.GroupNorm(channels_in, groups, epsilon=NORM_EPSILON, rngs=rngs)
        self.conv1 = _conv(channels_in, channels_out, 3, rngs)
        self.norm2 = nnx.GroupNorm(channels_out, groups, epsilon=NORM_EPSILON, rngs=rngs)
        self.conv2 = _conv(channels_out, channels_out, 3, rngs)
        is_same = channels_in == channels_out
        self.conv_shortcut = nnx.identity if is_same else _conv(channels_in, channels_out, 1, rngs)

    def __call__(self, x: Features) -> Float[Array, "B H W E"]:
        y = self.conv1(jax.nn.silu(self.norm1(x)))
        y = self.conv2(jax.nn.silu(self.norm2(y)))
        return y + self.conv_shortcut(x)


class _Attention(nnx.Module):
    """Residual self-attention over all positions, with one head."""

    def __init__(self, channels: int, groups: int, *, rngs: nnx.Rngs):
        self.group_norm = nnx.GroupNorm(channels, groups, epsilon=NORM_EPSILON, rngs=rngs)
        self.to_q, self.to_k, self.to_v = (nnx.Linear(channels, channels, rngs=rngs) for _ in range(3))
        self.to_out = nnx.List([nnx.Linear(channels, channels, rngs=rngs)])

    def __call__(self, x: Features) -> Features:
        tokens = self.group_norm(x).reshape(x.shape[0], -1, 1, x.shape[3])
        y = jax.nn.dot_product_attention(self.to_q(tokens), self.to_k(tokens), self.to_v(tokens))
        return x + self.to_out[0](y).reshape(x.shape)


class _MidBlock(nnx.Module):
    def __init__(self, channels: int, groups: int, *, rngs: nnx.Rngs):
        self.resnets = nnx.List([_ResidualBlock(channels, channels, groups, rngs=rngs) for _ in range(2)])
        self.attentions = nnx.List([_Attention(channels, groups, rngs=rngs)])

    def __call__(self, x: Features) -> Features:
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class _Downsampler(nnx.Module):
    """Applies a 3x3 convolution of stride 2 to x, padded with one row and column of zeros at the end of each axis."""

    def __init__(self, channels: int, *, rngs: nnx.Rngs):
        self.conv = _conv(channels, channels, 3, rngs, strides=2, padding=((0, 1), (0, 1)))

    def __call__(self, x: Features) -> Float[Array, "B h w D"]:
        return self.conv(x)


class _Upsampler(nnx.Module):
    """Repeats every position twice along both axes, then applies a 3x3 convolution."""

    def __init__(self, channels: int, *, rngs: nnx.Rngs):
        self.conv = _conv(channels, channels, 3, rngs)

    def __call__(self, x: Features) -> Float[Array, "B 2*H 2*W D"]:
        return self.conv(x.repeat(2, axis=1).repeat(2, axis=2))


class _Resolution(nnx.Module):
    """The residual blocks of one level, followed by its resamplers; the last level has none.

    Args:
      depth: number of residual blocks.
      groups: number of groups in group normalisation.
      resamplers: classes of the modules that follow the blocks, by the name of the attribute that holds the module.
    """

    def __init__(
        self,
        channels_in: int,
        channels: int,
        depth: int,
        groups: int,
        rngs: nnx.Rngs,
        **resamplers: type[_Downsampler] | type[_Upsampler],
    ):
        widths = [channels_in, *[channels] * depth]
        self.resnets = nnx.List([_ResidualBlock(a, b, groups, rngs=rngs) for a, b in itertools.pairwise(widths)])
        for name, kind in resamplers.items():
            setattr(self, name, nnx.List([kind(channels, rngs=rngs)]))
        self.resamplers = tuple(resamplers)

    def __call__(self, x: Features) -> Float[Array, "B h w E"]:
        for block in self.resnets:
            x = block(x)
        for name in self.resamplers:
            x = getattr(self, name)[0](x)
        return x


class _Encoder(nnx.Module):
    def __init__(self, config: KlConfig, *, rngs: nnx.Rngs):
        channels, groups = config.block_channels, config.norm_groups
        self.conv_in = _conv(3, channels[0], 3, rngs)
        self.down_blocks = nnx.List()
        for i, width in enumerate(channels):
            resampler = {} if i == len(channels) - 1 else {"downsamplers": _Downsampler}
            block = _Resolution(channels[max(i - 1, 0)], width, config.layers_per_block, groups, rngs, **resampler)
            self.down_blocks.append(block)
        self.mid_block = _MidBlock(channels[-1], groups, rngs=rngs)
        self.conv_norm_out = nnx.GroupNorm(channels[-1], groups, epsilon=NORM_EPSILON, rngs=rngs)
        self.conv_out = _conv(channels[-1], 2 * config.latent_channels, 3, rngs)

    def __call__(self, image: Image) -> Float[Array, "B h w M"]:
        x = self.conv_in(image)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(jax.nn.silu(self.conv_norm_out(self.mid_block(x))))


class _Decoder(nnx.Module):
    def __init__(self, config: KlConfig, *, rngs: nnx.Rngs):
        channels, groups = config.block_channels[::-1], config.norm_groups
        self.conv_in = _conv(config.latent_channels, channels[0], 3, rngs)
        self.mid_block = _MidBlock(channels[0], groups, rngs=rngs)
        self.up_blocks = nnx.List()
        for i, width in enumerate(channels):
            resampler = {} if i == len(channels) - 1 else {"upsamplers": _Upsampler}
            block = _Resolution(channels[max(i - 1, 0)], width, config.layers_per_block + 1, groups, rngs, **resampler)
            self.up_blocks.append(block)
        self.conv_norm_out = nnx.GroupNorm(channels[-1], groups, epsilon=NORM_EPSILON, rngs=rngs)
        self.conv_out = _conv(channels[-1], 3, 3, rngs)

    def __call__(self, latent: Latent) -> Image:
        x = self.mid_block(self.conv_in(latent))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(jax.nn.silu(self.conv_norm_out(x)))


class KlAutoencoder(nnx.Module):
    """Encodes images as normal distributions of latents, and decodes latents to images.

    All methods scale and shift the latents for the denoiser, except `moments`, which returns them unscaled.

    Args:
      config: sizes of the network, and scale and shift of the latents.
      rngs: randomness of the initial parameters.
    """

    def __init__(self, config: KlConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.encoder = _Encoder(config, rngs=rngs)
        self.decoder = _Decoder(config, rngs=rngs)
        channels = config.latent_channels
        self.quant_conv = _conv(2 * channels, 2 * channels, 1, rngs) if config.has_quant_conv else nnx.identity
        self.post_quant_conv = _conv(channels, channels, 1, rngs) if config.has_quant_conv else nnx.identity

    @property
    def channels(self) -> int:
        """Number of channels of a latent."""
        return self.config.latent_channels

    @property
    def downsampling(self) -> int:
        """Side of an image in pixels, divided by the side of its latent."""
        return self.config.downsampling

    def moments(self, image: Image) -> tuple[Latent, Latent]:
        """Returns mean and log variance of the latents, neither scaled nor shifted.

        Args:
          image: float32 in [-1, 1].

        Raises:
          ValueError: the image's sides are not multiples of the downsampling.
        """
        multiple = self.config.downsampling
        if image.shape[1] % multiple or image.shape[2] % multiple:
            raise ValueError(f"image is {image.shape[1:3]}, want multiples of {multiple} pixels; resize or pad it")
        mean, log_variance = jnp.split(self.quant_conv(self.encoder(image)), 2, axis=-1)
        return mean, jnp.clip(log_variance, *LOG_VARIANCE_RANGE)

    def distribution(self, image: Image) -> tuple[Latent, Latent]:
        """Returns mean and log variance of the scaled and shifted latents.

        Args:
          image: float32 in [-1, 1].

        Raises:
          ValueError: as `moments`.
        """
        mean, log_variance = self.moments(image)
        return self.config.scale * (mean - self.config.shift), log_variance + 2 * math.log(self.config.scale)

    def encode(self, image: Image, key: Key[Array, ""] | None = None) -> Latent:
        """Returns the latents of images.

        Args:
          image: float32 in [-1, 1].
          key: samples the latents from their distributions; None returns the means.

        Raises:
          ValueError: as `moments`.
        """
        mean, log_variance = self.distribution(image)
        return mean if key is None else draw(key, mean, log_variance)

    def decode(self, latent: Latent) -> Image:
        """Returns the images of latents, float32, nominally in [-1, 1].

        Latents with a side above `DECODE_TILE` are decoded in tiles (`decode_in_tiles`).
        """
        if max(latent.shape[1:3]) > DECODE_TILE:
            return self.decode_in_tiles(latent, DECODE_TILE, DECODE_TILE // 4)
        return self._decode(latent)

    def _decode(self, latent: Latent) -> Image:
        return self.decoder(self.post_quant_conv(latent / self.config.scale + self.config.shift))

    def decode_in_tiles(self, latent: Latent, tile: int = 64, overlap: int = 16) -> Image:
        """Returns the images of latents, decoded one square tile at a time, so that memory grows with the tile only.

        Neighbouring tiles overlap and are blended linearly there. Attention and normalisation see one tile at a time,
        so colours may differ slightly from those of an image that is decoded at once.

        Args:
          latent: scaled and shifted latents, as `encode` returns them.
          tile: side of a tile in latent positions.
          overlap: overlap of neighbouring tiles in latent positions, from 0 to `tile` - 1.

        Raises:
          ValueError: the overlap is out of range.
        """
        if not 0 <= overlap < tile:
            raise ValueError(f"overlap must be in 0..{tile - 1} (less than tile), got {overlap}")
        batch, height, width, _ = latent.shape
        if height <= tile and width <= tile:
            return self._decode(latent)
        rows, columns = _starts(height, tile, overlap), _starts(width, tile, overlap)
        tile_height, tile_width = min(tile, height), min(tile, width)
        factor = self.config.downsampling
        weight = jnp.minimum(
            _ramp(tile_height * factor, overlap * factor)[:, None], _ramp(tile_width * factor, overlap * factor)[None]
        )[None, :, :, None]
        corners = jnp.array([(0, row, column, 0) for row, column in itertools.product(rows, columns)], jnp.int32)
        tile_shape = (batch, tile_height, tile_width, latent.shape[3])

        def add(carry: tuple[Array, Array], corner: Array) -> tuple[tuple[Array, Array], None]:
            image, total = carry
            latent_tile, start = jax.lax.dynamic_slice(latent, corner, tile_shape), corner * factor
            image_sum = jax.lax.dynamic_slice(image, start, (batch, tile_height * factor, tile_width * factor, 3))
            weight_sum = jax.lax.dynamic_slice(total, start, weight.shape)
            image = jax.lax.dynamic_update_slice(image, image_sum + weight * self._decode(latent_tile), start)
            return (image, jax.lax.dynamic_update_slice(total, weight_sum + weight, start)), None

        image = jnp.zeros((batch, height * factor, width * factor, 3), jnp.float32)
        total = jnp.zeros((1, height * factor, width * factor, 1), jnp.float32)
        (image, total), _ = jax.lax.scan(add, (image, total), corners)
        return image / total


def draw(key: Key[Array, ""], mean: Latent, log_variance: Latent) -> Latent:
    """Returns one sample of each normal distribution, mean + exp(log_variance / 2) noise."""
    return mean + jnp.exp(log_variance / 2) * jax.random.normal(key, mean.shape, jnp.float32)


def _starts(length: int, tile: int, overlap: int) -> list[int]:
    """Returns the first position of each tile. All tiles have full size, and together they cover the axis."""
    last = max(length - tile, 0)
    return [*range(0, last, tile - overlap), last]


def _ramp(length: int, overlap: int) -> Float[Array, " length"]:
    """Returns the weights of a tile along one axis, which decrease linearly over the overlap and stay above zero."""
    from_start = jnp.arange(1, length + 1, dtype=jnp.float32)
    from_end = jnp.minimum(from_start, from_start[::-1])
    return jnp.minimum(from_end / (overlap + 1), 1.0)
