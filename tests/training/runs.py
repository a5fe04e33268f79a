"""What a run has come to, for tests that compare runs."""

import jax
import numpy as np

from sisma_jax.data import loading
from sisma_jax.runs.checkpoints import Checkpoints
from sisma_jax.training import loop
from sisma_jax.training.state import init_state


def final_state(workdir, config):
    """Returns every number of the newest checkpoint, and the batch that comes next."""
    abstract = jax.eval_shape(lambda: init_state(config))
    iterator = loading.train_iterator(config.data, batch_size=config.train.batch_size, seed=config.train.seed)
    with Checkpoints(workdir / loop.CHECKPOINTS_NAME, read_only=True) as checkpoints:
        restored = checkpoints.restore(loop._without_ema(abstract), abstract.ema, iterator)
    state = dict(restored.state) | {"key": jax.random.key_data(restored.state["key"])}
    return restored.step, jax.device_get((state, restored.ema)), next(iterator)


def assert_same(one, other):
    assert one[0] == other[0]
    jax.tree.map(np.testing.assert_array_equal, one, other)
