"""Runs without the command line, and what they have come to, for tests that compare runs."""

import jax
import numpy as np

from sisma_jax.data.dataset import DataSet
from sisma_jax.runs.checkpoints import Checkpoints
from sisma_jax.runs.folder import RunFolder
from sisma_jax.training import loop
from sisma_jax.training.state import init_state


def train(config, path):
    """Trains a run of pixels in a folder, or resumes it."""
    with RunFolder.writing(path, config) as run:
        loop.train(run, DataSet.open(config.data))


def final_state(path, config):
    """Returns every number of the newest checkpoint, and the batch that comes next."""
    abstract = jax.eval_shape(lambda: init_state(config))
    iterator = DataSet.open(config.data).train_batches(config.train.batch_size, config.train.seed)
    with Checkpoints(RunFolder(path, config).checkpoints, read_only=True) as checkpoints:
        restored = checkpoints.restore(loop._without_ema(abstract), abstract.ema, iterator)
    state = dict(restored.state) | {"key": jax.random.key_data(restored.state["key"])}
    return restored.step, jax.device_get((state, restored.ema)), next(iterator)


def assert_same(one, other):
    assert one[0] == other[0]
    jax.tree.map(np.testing.assert_array_equal, one, other)
