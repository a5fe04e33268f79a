"""From a run's folder to faces, in Python: `load(workdir)(mask, key=...)`."""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Integer, Key, UInt8

from sisma_jax.config import Config
from sisma_jax.data import images, labels
from sisma_jax.diffusion import sampling
from sisma_jax.errors import InputError
from sisma_jax.models.factory import Params, autoencoder_of, graph_of, init_params
from sisma_jax.training.checkpoints import Checkpoints
from sisma_jax.training.loop import CHECKPOINTS_NAME
from sisma_jax.training.workdir import read_config

TRACED_SETTINGS = ("shift", "guidance", "guidance_low", "guidance_high", "guidance_rescale")


class Pipeline:
    """Paints faces into masks with trained parameters.

    Attributes:
      config: of the run.
      params: averaged parameters of the denoiser.
      step: training step they are from.
    """

    def __init__(self, config: Config, params: Params, step: int):
        self.config = config
        self.params = params
        self.step = step
        self._sample = jax.jit(
            functools.partial(_sample, graph_of(config), config),
            static_argnames=("steps", "solver", "is_guided"),
        )

    def __call__(
        self,
        mask: Integer[np.ndarray, "H W"] | Integer[np.ndarray, "B H W"],
        *,
        key: Key[Array, ""],
        num_samples: int = 1,
        steps: int | None = None,
        solver: str | None = None,
        shift: float | None = None,
        guidance: float | None = None,
        guidance_low: float | None = None,
        guidance_high: float | None = None,
        guidance_rescale: float | None = None,
    ) -> UInt8[np.ndarray, "N S S 3"]:
        """Returns `num_samples` faces for each mask, RGB.

        The same key, mask and settings give the same faces, however many are painted in one call.

        Args:
          mask: class indices in 0..18, one mask or a batch; brought to the model's size S x S (nearest pixel, the
            central square of what is not square).
          key: randomness; face n of the result depends on `fold_in(key, n)`.
          num_samples: faces a mask; those of mask i are rows i * num_samples and on.
          steps, solver, shift, guidance, guidance_low, guidance_high, guidance_rescale: see `SampleConfig`; None takes
            the value of the run's configuration.

        Raises:
          InputError: the mask holds other labels, or a setting is out of range.
        """
        masks = self._masks(mask)
        if num_samples < 1:
            raise InputError(f"num_samples must be positive, got {num_samples}.")
        given = {
            "steps": steps,
            "solver": solver,
            "shift": shift,
            "guidance": guidance,
            "guidance_low": guidance_low,
            "guidance_high": guidance_high,
            "guidance_rescale": guidance_rescale,
        }
        # The section checks what it is given.
        settings = dataclasses.replace(self.config.sample, **{k: v for k, v in given.items() if v is not None})
        masks = np.repeat(masks, num_samples, axis=0)
        total = len(masks)
        batch_size = min(total, settings.batch_size)
        painted = []
        for start in range(0, total, batch_size):
            # The last batch is filled up, so that one shape compiles; what fills it is thrown away.
            rows = np.arange(start, start + batch_size)
            keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, rows)
            painted.append(
                self._sample(
                    self.params,
                    keys,
                    masks[np.minimum(rows, total - 1)],
                    # Traced, so that other values need no other program.
                    {name: jnp.float32(getattr(settings, name)) for name in TRACED_SETTINGS},
                    steps=settings.steps,
                    solver=settings.solver,
                    is_guided=settings.guidance != 1 and settings.guidance_low < settings.guidance_high,
                )
            )
        return np.concatenate([np.asarray(batch) for batch in painted])[:total]

    def _masks(self, mask: np.ndarray) -> np.ndarray:
        mask = np.asarray(mask)
        if mask.ndim not in (2, 3):
            raise InputError(f"mask has shape {mask.shape}, want (H, W) or (B, H, W) with class indices.")
        masks = labels.check_mask(mask if mask.ndim == 3 else mask[None], "mask")
        return np.stack([images.resize_mask(one, self.config.data.image_size) for one in masks])


def _sample(
    graph: nnx.GraphDef,
    config: Config,
    params: Params,
    keys: Key[Array, " B"],
    mask: UInt8[Array, "B S S"],
    traced: dict[str, Float[Array, ""]],
    *,
    steps: int,
    solver: str,
    is_guided: bool,
) -> UInt8[Array, "B S S 3"]:
    return sampling.sample(
        nnx.merge(graph, params),
        keys,
        mask,
        autoencoder=autoencoder_of(config),
        prediction=config.flow.prediction,
        steps=steps,
        solver=solver,
        shift=traced["shift"],
        guidance=traced["guidance"] if is_guided else 1.0,
        guidance_interval=(traced["guidance_low"], traced["guidance_high"]),
        guidance_rescale=traced["guidance_rescale"],
    )


def load(workdir: str | Path) -> Pipeline:
    """Returns the pipeline of a run, with the averaged parameters of its newest good checkpoint.

    Raises:
      InputError: the folder holds no run, or no checkpoint that can be read.
    """
    workdir = Path(workdir)
    config = read_config(workdir)
    abstract = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    with Checkpoints(workdir / CHECKPOINTS_NAME, read_only=True) as checkpoints:
        step, params = checkpoints.restore_ema(abstract)
    return Pipeline(config, params, step)
