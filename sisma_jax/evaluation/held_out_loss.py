"""The flow-matching loss on held-out examples, which are not used for training."""

from collections.abc import Callable, Iterable

import jax
import numpy as np
from jax.sharding import Mesh

from sisma_jax.models.factory import Params
from sisma_jax.parallel import sharding


def held_out_losses(
    losses: Callable[[Params, dict[str, jax.Array], int], jax.Array],
    params: Params,
    batches: Iterable[dict[str, np.ndarray]],
    batch_size: int,
    mesh: Mesh,
) -> np.ndarray:
    """Returns the loss of each example of the test split, float64 (N,); their mean is the held-out loss.

    Every call uses the same times and noise. The losses of two models, or of one model at two steps, are therefore
    comparable.

    Args:
      losses: (params, batch, index of the batch) -> loss of each example; see `training.step.make_held_out_loss`.
      params: parameters of the denoiser.
      batches: batches as in training, at least one; the last may be smaller. Every process passes all examples.
      batch_size: examples per call of `losses`. A smaller batch is padded with repeated examples, which do not count.
      mesh: device mesh over which a batch is sharded; it is in context when `losses` is called.
    """
    found = []
    with jax.set_mesh(mesh):
        for index, batch in enumerate(batches):
            filled = {name: np.resize(x, (batch_size, *x.shape[1:])) for name, x in batch.items() if name != "id"}
            loss = np.asarray(losses(params, sharding.to_devices(filled, mesh, batch_size), index))
            found.append(loss[: len(batch["mask"])].astype(np.float64))
    return np.concatenate(found)
