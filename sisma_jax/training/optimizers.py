"""Optimizers and learning rate schedules. A new optimizer is an entry in `_OPTIMIZERS` and a name in `OptimConfig`."""

from collections.abc import Callable
from typing import Any

import jax
import optax
import optax.contrib
from jaxtyping import Array

from sisma_jax.config import Config, OptimConfig
from sisma_jax.models.factory import Params
from sisma_jax.parallel.sharding import has_layer_axis

# The RMS of an update of Muon before the learning rate: that of AdamW, so that both have the same rate
# (arXiv 2502.16982, section 2.2).
_MUON_RMS = 0.2
# Parameters that are excluded from weight decay whatever their rank. A decayed A_log, for example, would change the
# decay rates of the scan's state rather than regularise the model.
_UNDECAYED = ("A_log", "D", "dt_bias", "null")


def learning_rate(config: Config) -> optax.Schedule:
    """Returns the learning rate schedule: linear warm-up, then a constant rate, or a cosine decay to 0."""
    optim, rate = config.optim, config.learning_rate
    if optim.decay_steps:
        after = optax.cosine_decay_schedule(rate, optim.decay_steps - optim.warmup_steps)
    else:
        after = optax.constant_schedule(rate)
    warmup = optax.linear_schedule(0.0, rate, max(optim.warmup_steps, 1))
    return optax.join_schedules([warmup, after], [optim.warmup_steps])


def make_optimizer(config: Config) -> optax.GradientTransformation:
    """Returns the configured optimizer, preceded by gradient clipping by global norm."""
    optimizer = _OPTIMIZERS[config.optim.name](config.optim, learning_rate(config))
    return optax.chain(optax.clip_by_global_norm(config.optim.clip_norm), optimizer)


def _adamw(optim: OptimConfig, rate: optax.Schedule) -> optax.GradientTransformation:
    return optax.adamw(rate, optim.b1, optim.b2, weight_decay=optim.weight_decay, mask=_is_decayed)


def _muon(optim: OptimConfig, rate: optax.Schedule) -> optax.GradientTransformation:
    return optax.contrib.muon(
        rate,
        weight_decay=optim.weight_decay,
        adam_b1=optim.b1,
        adam_b2=optim.b2,
        muon_weight_dimension_numbers=_muon_dimensions,  # pyright: ignore[reportArgumentType] a function of the parameters
        consistent_rms=_MUON_RMS,
    )


_OPTIMIZERS: dict[str, Callable[[OptimConfig, optax.Schedule], optax.GradientTransformation]] = {
    "adamw": _adamw,
    "muon": _muon,
}


def _is_decayed(params: Params) -> Params:
    """Returns for each parameter whether weight decay applies: to matrices only, except those in `_UNDECAYED`."""

    def is_decayed(path: tuple[Any, ...], x: Array) -> bool:
        rank = x.ndim - has_layer_axis(path)
        return rank > 1 and path[-1].key not in _UNDECAYED

    return jax.tree_util.tree_map_with_path(is_decayed, params)


def _muon_dimensions(params: Params) -> Params:
    """Returns for each parameter which axes Muon takes as a matrix, or None where AdamW updates it.

    Muon updates the decayed matrices of the layers. The axis of layers is a batch of matrices.
    """

    def dimensions(path: tuple[Any, ...], x: Array) -> optax.contrib.MuonDimensionNumbers | None:
        is_matrix = x.ndim - has_layer_axis(path) == 2 and path[-1].key not in _UNDECAYED
        return optax.contrib.MuonDimensionNumbers(-2, -1) if has_layer_axis(path) and is_matrix else None

    return jax.tree_util.tree_map_with_path(dimensions, params)
