"""The training state: everything that a training step changes."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Self

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, Key

from sisma_jax.config import Config
from sisma_jax.models.factory import Params, init_params
from sisma_jax.training.optimizers import make_optimizer


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Parameters, EMA parameters, optimizer state, and the position of the run. A pytree.

    Attributes:
      step: number of completed steps, int32.
      params: nested dictionaries of float32 arrays.
      ema: EMA parameters, in the structure of `params`; samples are drawn with these.
      opt_state: state of the optax optimizer.
      key: key of the run. It never changes, because a step uses `fold_in(key, step)`.
      skipped: number of consecutive steps up to the last one that were skipped because a value was not finite, int32.
    """

    step: Int[Array, ""]
    params: Params
    ema: Params
    opt_state: optax.OptState
    key: Key[Array, ""]
    skipped: Int[Array, ""]

    @classmethod
    def create(
        cls, init: Callable[[Key[Array, ""]], Params], optimizer: optax.GradientTransformation, seed: int
    ) -> Self:
        """Returns the state before the first step.

        Args:
          init: returns the initial parameters for a key.
          optimizer: initialises `opt_state`.
          seed: of the initial parameters and of the run's key.
        """
        init_key, run_key = jax.random.split(jax.random.key(seed))
        params = init(init_key)
        return cls(
            step=jnp.zeros((), jnp.int32),
            params=params,
            ema=jax.tree.map(jnp.copy, params),
            opt_state=optimizer.init(params),
            key=run_key,
            skipped=jnp.zeros((), jnp.int32),
        )


def init_state(config: Config) -> TrainState:
    """Returns the denoiser's training state before the first step; it depends only on the configuration."""
    return TrainState.create(functools.partial(init_params, config), make_optimizer(config), config.train.seed)
