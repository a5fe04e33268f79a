"""From a run's folder to faces, in Python: `load(workdir)(mask, key=...)`."""

import dataclasses
import functools
import os
from collections.abc import Callable
from typing import Literal, TypedDict, Unpack

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Integer, Key, UInt8, UInt32

from sisma_jax.config import Config, MeshConfig, Solver
from sisma_jax.data import images, labels
from sisma_jax.diffusion import editing, sampling
from sisma_jax.errors import InputError
from sisma_jax.files import to_path
from sisma_jax.models.autoencoder import IdentityAutoencoder, KlAutoencoder
from sisma_jax.models.factory import Params, graph_of, init_params
from sisma_jax.parallel import sharding
from sisma_jax.runs.checkpoints import Checkpoints
from sisma_jax.runs.export import EXPORT_SUFFIX, load_exported
from sisma_jax.runs.folder import read_config
from sisma_jax.training import autoencoder as autoencoders
from sisma_jax.training.loop import BEST, CHECKPOINTS_NAME

TRACED_SETTINGS = ("shift", "guidance", "guidance_low", "guidance_high", "guidance_rescale")


class Settings(TypedDict, total=False):
    """How to sample: see `SampleConfig`. What is left out, or None, is as in the run's configuration."""

    steps: int | None
    solver: Solver | None
    shift: float | None
    guidance: float | None
    guidance_low: float | None
    guidance_high: float | None
    guidance_rescale: float | None


class Pipeline:
    """Paints faces into masks with trained parameters, on all devices of a mesh.

    In a job of several processes each makes the same calls, and each gets all faces.

    Attributes:
      config: of the run.
      params: averaged parameters of the denoiser.
      step: training step they are from.
      autoencoder: between images and latents.
      mesh: of the devices that paint.
    """

    def __init__(
        self,
        config: Config,
        params: Params,
        step: int,
        autoencoder: IdentityAutoencoder | KlAutoencoder | None = None,
        mesh: Mesh | None = None,
    ):
        """Makes the pipeline.

        Args:
          autoencoder: none is needed by a denoiser of pixels.
          mesh: by default every device has all parameters and a part of each batch.
        """
        self.config = config
        self.step = step
        self.autoencoder = autoencoder or IdentityAutoencoder()
        self.mesh = sharding.make_mesh(MeshConfig()) if mesh is None else mesh
        self.params = sharding.distribute(params, sharding.of_state(params, self.mesh))
        autoencoder_graph, autoencoder_params = nnx.split(self.autoencoder)
        whole = jax.tree.map(lambda _: sharding.replicated(self.mesh), autoencoder_params)
        self._autoencoder_params = sharding.distribute(autoencoder_params, whole)
        self._sample = jit_sampler(config, autoencoder_graph, self.mesh)

    def __call__(
        self,
        mask: Integer[np.ndarray, "H W"] | Integer[np.ndarray, "B H W"],
        *,
        key: Key[Array, ""] | Key[Array, " N"],
        num_samples: int = 1,
        **settings: Unpack[Settings],
    ) -> UInt8[np.ndarray, "N S S 3"]:
        """Returns `num_samples` faces for each mask, RGB.

        The same key, mask and settings give the same faces, however many are painted in one call.

        Args:
          mask: class indices in 0..18, one mask or a batch; brought to the model's size S x S (nearest pixel, the
            central square of what is not square).
          key: randomness. Face n of the result depends on `fold_in(key, n)`, or on key n if there are N of them: the
            same key and another mask give a face of the same style.
          num_samples: faces a mask; those of mask i are rows i * num_samples and on.
          settings: see `Settings`.

        Raises:
          InputError: the mask holds other labels, or a setting is out of range.
        """
        masks = self._resized(_checked(mask, "mask"))
        return self._paint(masks, key, num_samples, settings)

    def edit(
        self,
        image: UInt8[np.ndarray, "H W 3"],
        mask: Integer[np.ndarray, "h w"] | Integer[np.ndarray, "B h w"],
        *,
        key: Key[Array, ""] | Key[Array, " N"],
        image_mask: Integer[np.ndarray, "h w"] | None = None,
        region: Bool[np.ndarray, "h w"] | None = None,
        margin: int | None = None,
        num_samples: int = 1,
        **settings: Unpack[Settings],
    ) -> UInt8[np.ndarray, "N H W 3"]:
        """Repaints a photograph where its mask was changed; the rest of its pixels stay as they are, bit for bit.

        Works on the central square of photograph and masks. The face is painted at the model's size and brought to
        that of the photograph.

        Args:
          image: RGB, of any size.
          mask: edited masks, as for `__call__`: each gives an edit of the same photograph.
          key: as for `__call__`.
          image_mask: the mask before it was edited; the region is where it differs.
          region: what to repaint, in place of `image_mask`.
          margin: pixels of the model's size S by which what is painted reaches out of the region, to be blended with
            the photograph there. None: a 32nd of S; 0: not one pixel outside of the region changes.
          num_samples: edits a mask; those of mask i are rows i * num_samples and on.
          settings: see `Settings`.

        Raises:
          InputError: the photograph is not 8-bit RGB, a mask holds other labels or is of another size than the one it
            is compared with, nothing differs, not one of `image_mask` and `region` is given, or a setting is out of
            range.
        """
        image, size = np.asarray(image), self.config.data.image_size
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise InputError(f"image must be uint8 (H, W, 3), got {image.dtype} {image.shape}.")
        if (image_mask is None) == (region is None):
            raise InputError("name either image_mask, the mask before it was edited, or region, what to repaint.")
        margin = size // 32 if margin is None else margin
        if margin < 0:
            raise InputError(f"margin must be non-negative, got {margin}.")
        masks = _checked(mask, "mask")
        changed = _changed(masks, image_mask) if region is None else np.asarray(region, bool)[None]
        changed = np.broadcast_to(changed, (len(masks), *changed.shape[1:]))
        if not changed.any(axis=(1, 2)).all():
            raise InputError("there is nothing to repaint: the mask is that of the photograph, or the region is empty.")
        side = min(image.shape[:2])
        squares = [images.central_square(one) for one in changed]
        weights = [editing.feather(editing.resize_region(one, side), margin * side / size) for one in squares]
        reach = np.stack([editing.feather(editing.resize_region(one, size), margin) > 0 for one in squares])
        painted = self._paint(
            self._resized(masks), key, num_samples, settings, images.resize_image(image, size)[None], reach
        )
        return np.stack([editing.composite(image, face, weights[i // num_samples]) for i, face in enumerate(painted)])

    def _paint(
        self,
        masks: UInt8[np.ndarray, "B S S"],
        key: Key[Array, ""] | Key[Array, " N"],
        num_samples: int,
        given: Settings,
        image: UInt8[np.ndarray, "1 S S 3"] | None = None,
        regions: Bool[np.ndarray, "B S S"] | None = None,
    ) -> UInt8[np.ndarray, "N S S 3"]:
        if num_samples < 1:
            raise InputError(f"num_samples must be positive, got {num_samples}.")
        if unknown := set(given) - set(Settings.__annotations__):
            raise TypeError(f"unknown settings {', '.join(sorted(unknown))}")
        # The section checks what it is given.
        settings = dataclasses.replace(self.config.sample, **{k: v for k, v in given.items() if v is not None})
        total = len(masks) * num_samples
        keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, np.arange(total)) if key.ndim == 0 else key
        if keys.shape != (total,):
            raise InputError(f"key has shape {key.shape}, want one key or {total}, one a face.")
        key_data = np.asarray(jax.random.key_data(keys))
        batch_size = sharding.round_up(min(total, settings.batch_size), self.mesh)
        painted = []
        for start in range(0, total, batch_size):
            # The last batch is filled up, so that one shape compiles; what fills it is thrown away.
            rows = np.minimum(np.arange(start, start + batch_size), total - 1)
            batch = {"mask": masks[rows // num_samples]}
            if regions is not None:
                batch["region"] = regions[rows // num_samples]
            with jax.set_mesh(self.mesh):
                faces = self._sample(
                    self.params,
                    self._autoencoder_params,
                    key_data[rows],
                    sharding.to_devices(batch, self.mesh, batch_size),
                    # Traced, so that other values need no other program.
                    {name: np.float32(getattr(settings, name)) for name in TRACED_SETTINGS},
                    image,
                    key_impl=jax.random.key_impl(keys),
                    steps=settings.steps,
                    solver=settings.solver,
                    is_guided=settings.guidance != 1 and settings.guidance_low < settings.guidance_high,
                )
            painted.append(faces)
        return np.concatenate([np.asarray(batch) for batch in painted])[:total]

    def _resized(self, masks: UInt8[np.ndarray, "B H W"]) -> UInt8[np.ndarray, "B S S"]:
        return np.stack([images.resize_mask(mask, self.config.data.image_size) for mask in masks])


def _checked(mask: np.ndarray, name: str) -> UInt8[np.ndarray, "B H W"]:
    mask = np.asarray(mask)
    if mask.ndim not in (2, 3):
        raise InputError(f"{name} has shape {mask.shape}, want (H, W) or (B, H, W) with class indices.")
    return labels.check_mask(mask if mask.ndim == 3 else mask[None], name)


def _changed(masks: UInt8[np.ndarray, "B H W"], image_mask: np.ndarray) -> Bool[np.ndarray, "B H W"]:
    before = _checked(image_mask, "image_mask")
    if before.shape[1:] != masks.shape[1:]:
        raise InputError(f"mask is {masks.shape[1:]} and image_mask {before.shape[1:]}; they must be of one size.")
    return masks != before


def jit_sampler(config: Config, autoencoder_graph: nnx.GraphDef, mesh: Mesh) -> Callable[..., UInt8[Array, "B S S 3"]]:
    """Returns the compiled function from parameters, keys and masks to faces, which are whole on every device.

    Takes the arguments of `_sample` after `prediction`; the mesh has to be in context.
    """
    return jax.jit(
        functools.partial(_sample, graph_of(config), autoencoder_graph, config.flow.prediction),
        static_argnames=("key_impl", "steps", "solver", "is_guided"),
        out_shardings=sharding.replicated(mesh),
    )


def _sample(
    graph: nnx.GraphDef,
    autoencoder_graph: nnx.GraphDef,
    prediction: str,
    params: Params,
    autoencoder_params: nnx.State,
    key_data: UInt32[Array, "B words"],
    batch: dict[str, Array],
    traced: dict[str, Float[Array, ""]],
    image: UInt8[Array, "1 S S 3"] | None,
    *,
    key_impl: str,
    steps: int,
    solver: str,
    is_guided: bool,
) -> UInt8[Array, "B S S 3"]:
    return sampling.sample(
        nnx.merge(graph, params),
        jax.random.wrap_key_data(key_data, impl=key_impl),
        batch["mask"],
        autoencoder=nnx.merge(autoencoder_graph, autoencoder_params),
        prediction=prediction,
        steps=steps,
        solver=solver,
        shift=traced["shift"],
        guidance=traced["guidance"] if is_guided else 1.0,
        guidance_interval=(traced["guidance_low"], traced["guidance_high"]),
        guidance_rescale=traced["guidance_rescale"],
        image=image,
        region=batch.get("region"),
    )


def load(
    path: str | os.PathLike, *, checkpoint: int | Literal["newest", "best"] = "newest", mesh: Mesh | None = None
) -> Pipeline:
    """Returns the pipeline of a run's folder, or of a file that the command `export` wrote.

    Args:
      path: on the disk, or in a bucket (gs://...).
      checkpoint: of the folder, whose averaged parameters to take: the newest that is whole, that of the lowest
        held-out loss, or that of a step.
      mesh: see `Pipeline`.

    Raises:
      InputError: the folder holds no run, or no such checkpoint or no autoencoder that can be read; or the file is
        damaged or of another program.
    """
    path = to_path(path)
    mesh = sharding.make_mesh(MeshConfig()) if mesh is None else mesh
    if path.suffix == EXPORT_SUFFIX:
        exported = load_exported(path)
        return Pipeline(exported.config, exported.params, exported.step, exported.autoencoder, mesh)
    config = read_config(path)
    abstract = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    placed = sharding.place(abstract, sharding.of_state(abstract, mesh))
    with Checkpoints(path / CHECKPOINTS_NAME, best=BEST, read_only=True) as checkpoints:
        step, params = checkpoints.restore_ema(placed, None if checkpoint == "newest" else checkpoint)
    return Pipeline(config, params, step, autoencoders.load(config, path), mesh)
