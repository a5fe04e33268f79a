"""From a run's folder, or an exported file, to faces in Python: `load(path)(mask, key=...)`."""

import dataclasses
import functools
import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Integer, Key, UInt8, UInt32

from sisma_jax.config import Config, MeshConfig, Sampling
from sisma_jax.data import photos
from sisma_jax.data.masks import resize_mask
from sisma_jax.diffusion import editing
from sisma_jax.diffusion.sampling import sample
from sisma_jax.errors import InputError
from sisma_jax.files import to_path
from sisma_jax.models.autoencoder import IdentityAutoencoder, KlAutoencoder
from sisma_jax.models.factory import Params, make_graph
from sisma_jax.parallel import sharding
from sisma_jax.runs.export import EXPORT_SUFFIX, load_exported

if TYPE_CHECKING:
    from sisma_jax.runs.folder import Checkpoint, RunFolder


class Pipeline:
    """Samples faces for masks with trained parameters, on all devices of a mesh.

    In a job of several processes each makes the same calls, and each gets all faces.

    Attributes:
      config: of the run.
      params: EMA parameters of the denoiser.
      step: training step they are from.
      autoencoder: between images and latents.
      mesh: of the devices that sample.
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
        replicated = jax.tree.map(lambda _: sharding.replicated(self.mesh), autoencoder_params)
        self._autoencoder_params = sharding.distribute(autoencoder_params, replicated)
        self._sample = jit_sampler(config, autoencoder_graph, self.mesh)

    def __call__(
        self,
        mask: Integer[np.ndarray, "H W"] | Integer[np.ndarray, "B H W"],
        *,
        key: Key[Array, ""] | Key[Array, " N"],
        num_samples: int = 1,
        sampling: Sampling | None = None,
        **overrides: Any,
    ) -> UInt8[np.ndarray, "N S S 3"]:
        """Returns `num_samples` faces for each mask, RGB.

        The same key, mask and settings give the same faces, however many are sampled in one call.

        Args:
          mask: class indices, one mask or a batch; resized to the model's resolution S x S (nearest pixel, the central
            square of what is not square).
          key: randomness. Face n of the result depends on `fold_in(key, n)`, or on key n if there are N of them: the
            same key and another mask give a face of the same style.
          num_samples: faces per mask; those of mask i are rows i * num_samples and on.
          sampling: settings in place of the configuration's `sample` section, whose `seed` plays no part here.
          overrides: single settings, as the fields of `Sampling`: `steps=4, guidance=2.0`.

        Raises:
          InputError: the mask holds other labels, or a setting is out of range.
          TypeError: there is no such setting.
        """
        masks = self._resized(self._checked(mask, "mask"))
        return self._run({"mask": masks}, key, num_samples, self._settings(sampling, overrides))

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
        sampling: Sampling | None = None,
        **overrides: Any,
    ) -> UInt8[np.ndarray, "N H W 3"]:
        """Repaints a photograph where its mask was changed; its other pixels stay as they are, bit for bit.

        Works on the central square of photograph and masks. The face is sampled at the model's resolution and resized
        to that of the photograph.

        Args:
          image: RGB, of any size.
          mask: edited masks, as for `__call__`: each gives an edit of the same photograph.
          key: as for `__call__`.
          image_mask: the mask before it was edited; the region is where it differs.
          region: what to repaint, in place of `image_mask`.
          margin: pixels at the model's resolution S by which the repainted region reaches out, to be blended with the
            photograph there. None: a 32nd of S; 0: not one pixel outside of the region changes.
          num_samples: edits per mask; those of mask i are rows i * num_samples and on.
          sampling, overrides: as for `__call__`.

        Raises:
          InputError: the photograph is not 8-bit RGB, a mask holds other labels or is of another size than the one it
            is compared with, nothing differs, not one of `image_mask` and `region` is given, or a setting is out of
            range.
          TypeError: there is no such setting.
        """
        image, size = np.asarray(image), self.config.data.image_size
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise InputError(f"image must be uint8 (H, W, 3), got {image.dtype} {image.shape}.")
        if (image_mask is None) == (region is None):
            raise InputError("name either image_mask, the mask before it was edited, or region, what to repaint.")
        margin = size // 32 if margin is None else margin
        if margin < 0:
            raise InputError(f"margin must be non-negative, got {margin}.")
        masks = self._checked(mask, "mask")
        changed = self._changed(masks, image_mask) if region is None else np.asarray(region, bool)[None]
        changed = np.broadcast_to(changed, (len(masks), *changed.shape[1:]))
        if not changed.any(axis=(1, 2)).all():
            raise InputError("there is nothing to repaint: the mask is that of the photograph, or the region is empty.")
        side = min(image.shape[:2])
        squares = [photos.central_square(one) for one in changed]
        weights = [editing.feather(editing.resize_region(one, side), margin * side / size) for one in squares]
        reach = np.stack([editing.feather(editing.resize_region(one, size), margin) > 0 for one in squares])
        faces = self._run(
            {"mask": self._resized(masks)},
            key,
            num_samples,
            self._settings(sampling, overrides),
            photos.resize_image(image, size)[None],
            reach,
        )
        return np.stack([editing.composite(image, face, weights[i // num_samples]) for i, face in enumerate(faces)])

    def _settings(self, given: Sampling | None, overrides: Mapping[str, Any]) -> Sampling:
        """Returns what was given, else the configuration's settings; with the overrides, which are checked here."""
        if "seed" in overrides:
            raise InputError("seed is no setting of a call; give key=jax.random.key(seed).")
        return dataclasses.replace(self.config.sample if given is None else given, **overrides)

    def _run(
        self,
        inputs: Mapping[str, np.ndarray],
        key: Key[Array, ""] | Key[Array, " N"],
        num_samples: int,
        settings: Sampling,
        image: UInt8[np.ndarray, "1 S S 3"] | None = None,
        regions: Bool[np.ndarray, "B S S"] | None = None,
    ) -> UInt8[np.ndarray, "N S S 3"]:
        if num_samples < 1:
            raise InputError(f"num_samples must be positive, got {num_samples}.")
        total = len(inputs["mask"]) * num_samples
        keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, np.arange(total)) if key.ndim == 0 else key
        if keys.shape != (total,):
            raise InputError(f"key has shape {key.shape}, want one key or {total}, one per face.")
        key_data = np.asarray(jax.random.key_data(keys))
        batch_size = sharding.round_up(min(total, settings.batch_size), self.mesh)
        faces = []
        for start in range(0, total, batch_size):
            # The last batch is filled up, so that one shape compiles; what fills it is thrown away.
            rows = np.minimum(np.arange(start, start + batch_size), total - 1)
            given = inputs if regions is None else {**inputs, "region": regions}
            batch = sharding.to_devices(
                {name: x[rows // num_samples] for name, x in given.items()}, self.mesh, batch_size
            )
            region = batch.pop("region", None)
            with jax.set_mesh(self.mesh):
                faces.append(
                    self._sample(
                        self.params,
                        self._autoencoder_params,
                        key_data[rows],
                        batch,
                        settings,
                        image,
                        region,
                        key_impl=jax.random.key_impl(keys),
                    )
                )
        return np.concatenate([np.asarray(batch) for batch in faces])[:total]

    def _resized(self, masks: UInt8[np.ndarray, "B H W"]) -> UInt8[np.ndarray, "B S S"]:
        return np.stack([resize_mask(mask, self.config.data.image_size) for mask in masks])

    def _checked(self, mask: np.ndarray, name: str) -> UInt8[np.ndarray, "B H W"]:
        mask = np.asarray(mask)
        if mask.ndim not in (2, 3):
            raise InputError(f"{name} has shape {mask.shape}, want (H, W) or (B, H, W) with class indices.")
        return self.config.data.classes.check(mask if mask.ndim == 3 else mask[None], name)

    def _changed(self, masks: UInt8[np.ndarray, "B H W"], image_mask: np.ndarray) -> Bool[np.ndarray, "B H W"]:
        before = self._checked(image_mask, "image_mask")
        if before.shape[1:] != masks.shape[1:]:
            raise InputError(f"mask is {masks.shape[1:]} and image_mask {before.shape[1:]}; they must be of one size.")
        return masks != before


def jit_sampler(config: Config, autoencoder_graph: nnx.GraphDef, mesh: Mesh) -> Callable[..., UInt8[Array, "B S S 3"]]:
    """Returns the compiled function from parameters, keys and masks to faces, which are replicated.

    Takes the arguments of `_sample` after `prediction`; the mesh has to be in context.
    """
    return jax.jit(
        functools.partial(_sample, make_graph(config), autoencoder_graph, config.flow.prediction),
        static_argnames="key_impl",
        out_shardings=sharding.replicated(mesh),
    )


def _sample(
    graph: nnx.GraphDef,
    autoencoder_graph: nnx.GraphDef,
    prediction: str,
    params: Params,
    autoencoder_params: nnx.State,
    key_data: UInt32[Array, "B words"],
    inputs: Mapping[str, Array],
    settings: Sampling,
    image: UInt8[Array, "1 S S 3"] | None,
    region: Bool[Array, "B S S"] | None,
    *,
    key_impl: str,
) -> UInt8[Array, "B S S 3"]:
    return sample(
        nnx.merge(graph, params),
        jax.random.wrap_key_data(key_data, impl=key_impl),
        inputs,
        settings,
        autoencoder=nnx.merge(autoencoder_graph, autoencoder_params),
        prediction=prediction,
        image=image,
        region=region,
    )


def load(path: str | os.PathLike, *, checkpoint: "Checkpoint" = "newest", mesh: Mesh | None = None) -> Pipeline:
    """Returns the pipeline of a run's folder, or of a file that the command `export` wrote.

    Args:
      path: on the disk, or in a bucket (gs://...).
      checkpoint: of the folder, whose EMA parameters to take: the newest that is whole, that of the lowest held-out
        loss, or that of a step.
      mesh: see `Pipeline`.

    Raises:
      InputError: the folder holds no run, or no such checkpoint or no autoencoder that can be read; or the file is
        damaged or of another program.
    """
    path = to_path(path)
    if path.suffix == EXPORT_SUFFIX:
        exported = load_exported(path)
        return Pipeline(exported.config, exported.params, exported.step, exported.autoencoder, mesh)
    from sisma_jax.runs.folder import RunFolder  # and with it Orbax, which exported files do not need

    return from_run(RunFolder.open(path), checkpoint=checkpoint, mesh=mesh)


def from_run(run: "RunFolder", *, checkpoint: "Checkpoint" = "newest", mesh: Mesh | None = None) -> Pipeline:
    """Returns the pipeline of an opened run; otherwise as `load`."""
    mesh = sharding.make_mesh(MeshConfig()) if mesh is None else mesh
    step, params = run.restore_ema(mesh, checkpoint)
    return Pipeline(run.config, params, step, run.autoencoder, mesh)
