"""The flow-matching loss on examples that no update has seen."""

from collections.abc import Callable

import jax
import numpy as np

from sisma_jax.config import DataConfig
from sisma_jax.data import loading
from sisma_jax.models.factory import Params


def held_out_loss(
    losses: Callable[..., jax.Array], params: Params, config: DataConfig, *, batch_size: int, num_examples: int
) -> float:
    """Returns the mean loss over the first examples of the test split.

    Times and noise are the same in every call, so two models, or one model at two steps, are compared on equal terms.

    Args:
      losses: (params, batch, key) -> loss of each example.
      params: the denoiser's.
      batch_size: examples a call; the last batch is filled up with copies that do not count.
      num_examples: at most this many.
    """
    total, count = 0.0, 0
    batches = loading.eval_batches(config, "test", batch_size=batch_size, limit=num_examples)
    for index, batch in enumerate(batches):
        size = len(batch["image"])
        filled = {name: np.resize(batch[name], (batch_size, *batch[name].shape[1:])) for name in ("image", "mask")}
        loss = np.asarray(losses(params, filled, jax.random.fold_in(jax.random.key(0), index)))
        total += float(loss[:size].sum(dtype=np.float64))
        count += size
    return total / count
