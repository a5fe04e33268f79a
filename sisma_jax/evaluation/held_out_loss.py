"""The flow-matching loss on examples that no update has seen."""

from collections.abc import Callable, Iterable

import jax
import numpy as np
from jax.sharding import Mesh

from sisma_jax.models.factory import Params
from sisma_jax.parallel import sharding


def held_out_loss(
    losses: Callable[[Params, dict[str, jax.Array], int], jax.Array],
    params: Params,
    batches: Iterable[dict[str, np.ndarray]],
    batch_size: int,
    mesh: Mesh,
) -> float:
    """Returns the mean loss over batches of the test split.

    Times and noise are the same in every call, so two models, or one model at two steps, are compared on equal terms.

    Args:
      losses: (params, batch, number of the batch) -> loss of each example; see `training.step.make_held_out_loss`.
      params: the denoiser's.
      batches: as in training; the last may be smaller. Every process has all of them.
      batch_size: examples per call; the last batch is padded with copies that do not count.
      mesh: of the devices that share a batch; in context for `losses`.
    """
    total, count = 0.0, 0
    with jax.set_mesh(mesh):
        for index, batch in enumerate(batches):
            size = len(batch["mask"])
            filled = {name: np.resize(x, (batch_size, *x.shape[1:])) for name, x in batch.items() if name != "id"}
            loss = np.asarray(losses(params, sharding.to_devices(filled, mesh, batch_size), index))
            total += float(loss[:size].sum(dtype=np.float64))
            count += size
    return total / count
