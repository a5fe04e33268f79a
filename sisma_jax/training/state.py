"""Everything that a training step changes."""

import functools
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, Key

from sisma_jax.config import Config
from sisma_jax.models.factory import Params, init_params
from sisma_jax.parallel.sharding import is_stacked

# Parameters of the scan that weight decay must leave alone whatever their rank: a decayed A_log changes the
# model's memory, not its complexity.
_UNDECAYED = ("A_log", "D", "dt_bias", "null")


@chex.dataclass(frozen=True)
class TrainState:
    """Parameters, their average, the optimiser's state, and where the run is.

    Attributes:
      step: updates done, int32 scalar.
      params, ema: nested dictionaries of float32 arrays; `ema` is what samples are drawn from.
      opt_state: optax's.
      key: the run's key; a step uses `fold_in(key, step)`, so it never changes.
      skipped: int32 scalar, the last steps in a row whose gradients were not finite and changed nothing.
    """

    step: Int[Array, ""]
    params: Params
    ema: Params
    opt_state: optax.OptState
    key: Key[Array, ""]
    skipped: Int[Array, ""]


def _is_decayed(params: Params) -> Params:
    def is_decayed(path: tuple[Any, ...], x: Array) -> bool:
        rank = x.ndim - is_stacked(path)
        return rank > 1 and path[-1].key not in _UNDECAYED

    return jax.tree_util.tree_map_with_path(is_decayed, params)


def learning_rate(config: Config) -> optax.Schedule:
    """Returns the schedule: linear warm-up, then a constant rate or a cosine to zero at `decay_steps`."""
    optim, rate = config.optim, config.learning_rate
    if optim.decay_steps:
        after = optax.cosine_decay_schedule(rate, optim.decay_steps - optim.warmup_steps)
    else:
        after = optax.constant_schedule(rate)
    warmup = optax.linear_schedule(0.0, rate, max(optim.warmup_steps, 1))
    return optax.join_schedules([warmup, after], [optim.warmup_steps])


def optimizer(config: Config) -> optax.GradientTransformation:
    """Returns AdamW behind clipping by global norm; weight decay touches matrices only."""
    optim = config.optim
    adamw = optax.adamw(learning_rate(config), optim.b1, optim.b2, weight_decay=optim.weight_decay, mask=_is_decayed)
    return optax.chain(optax.clip_by_global_norm(optim.clip_norm), adamw)


def init_state(config: Config) -> TrainState:
    """Returns the state before the first step, a function of the configuration alone."""
    return init_state_of(functools.partial(init_params, config), optimizer(config), config.train.seed)


def init_state_of(
    init: Callable[[Key[Array, ""]], Params], transformation: optax.GradientTransformation, seed: int
) -> TrainState:
    """Returns the state before the first step of a training of the parameters that `init` makes."""
    init_key, run_key = jax.random.split(jax.random.key(seed))
    params = init(init_key)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        ema=jax.tree.map(jnp.copy, params),
        opt_state=transformation.init(params),
        key=run_key,
        skipped=jnp.zeros((), jnp.int32),
    )
