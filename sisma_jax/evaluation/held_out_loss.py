"""The flow-matching loss on examples that no update has seen."""

from collections.abc import Callable, Iterable

import jax
import numpy as np

from sisma_jax.models.factory import Params


def held_out_loss(
    losses: Callable[..., jax.Array], params: Params, batches: Iterable[dict[str, np.ndarray]], batch_size: int
) -> float:
    """Returns the mean loss over batches of the test split.

    Times and noise are the same in every call, so two models, or one model at two steps, are compared on equal terms.

    Args:
      losses: (params, batch, key) -> loss of each example.
      params: the denoiser's.
      batches: of examples as in training, but for their ids; the last may be smaller.
      batch_size: examples a call; the last batch is filled up with copies that do not count.
    """
    total, count = 0.0, 0
    for index, batch in enumerate(batches):
        size = len(batch["mask"])
        filled = {name: np.resize(x, (batch_size, *x.shape[1:])) for name, x in batch.items() if name != "id"}
        loss = np.asarray(losses(params, filled, jax.random.fold_in(jax.random.key(0), index)))
        total += float(loss[:size].sum(dtype=np.float64))
        count += size
    return total / count
