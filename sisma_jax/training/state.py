"""Everything that a training step changes."""

import functools
from collections.abc import Callable
from typing import Self

import chex
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, Key

from sisma_jax.config import Config
from sisma_jax.models.factory import Params, init_params
from sisma_jax.training.optimizers import make_optimizer


@chex.dataclass(frozen=True)
class TrainState:
    """Parameters, their EMA, the optimizer's state, and where the run is.

    Attributes:
      step: updates done, int32 scalar.
      params, ema: nested dictionaries of float32 arrays; samples are drawn with `ema`.
      opt_state: optax's.
      key: the run's key; a step uses `fold_in(key, step)`, so it never changes.
      skipped: int32 scalar, the last steps in a row that were skipped because a value was not finite.
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
        """Returns the state before the first step of a training of the parameters that `init` makes."""
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
    """Returns the denoiser's state before the first step, a function of the configuration alone."""
    return TrainState.create(functools.partial(init_params, config), make_optimizer(config), config.train.seed)
