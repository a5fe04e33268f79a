"""States to save, and what the tests of checkpoints do with them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax

from sisma_jax.config import MeshConfig
from sisma_jax.parallel import sharding
from sisma_jax.runs.checkpoints import Checkpoints


def make_iterator(process_index: int = 0, process_count: int = 1) -> grain.DatasetIterator:
    """Returns an iterator over a process's part of batches of four."""
    dataset = grain.MapDataset.source(range(100)).seed(0).shuffle().repeat()
    dataset = dataset[process_index::process_count].batch(4 // process_count)
    return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=2)))


def make_state(seed: int = 0) -> dict[str, Any]:
    """A state with all that Optax puts into one: NamedTuples, empty and masked nodes; and a typed key."""
    params = {
        "kernel": jax.random.normal(jax.random.key(seed), (64, 48)),
        "bias": jnp.arange(5, dtype=jnp.bfloat16),
        "order": jnp.array([True, False]),
    }
    trainable = {"kernel": True, "bias": True, "order": False}
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.masked(optax.adamw(1e-3), trainable))
    return {
        "params": params,
        "opt_state": optimizer.init(params),
        "step": jnp.int32(seed),
        "key": jax.random.key(seed + 1),
    }


def make_ema(seed: int = 0) -> dict[str, jax.Array]:
    return {"kernel": jax.random.normal(jax.random.key(100 + seed), (64, 48))}


def save(checkpoints: Checkpoints, step: int, iterator: grain.DatasetIterator | None = None, **metrics: float) -> None:
    checkpoints.save(step, state=make_state(step), ema=make_ema(step), iterator=iterator, metrics=metrics)
    checkpoints.wait()


def abstract() -> tuple[Any, Any]:
    return jax.eval_shape(make_state), jax.eval_shape(make_ema)


def make_large_state() -> dict[str, Any]:
    """A state with an array that is large enough to be split over `fsdp`, and small ones."""
    kernel = jax.random.normal(jax.random.key(0), (sharding.MIN_SPLIT_ENTRIES // 64, 64))
    return {"params": {"kernel": kernel, "bias": kernel[0]}, "step": jnp.int32(7), "key": jax.random.key(1)}


def placed_large_state(devices: Sequence[jax.Device]) -> dict[str, Any]:
    """Returns the shapes of `make_large_state` with their shardings on a mesh of these devices."""
    mesh = sharding.make_mesh(MeshConfig(fsdp=len(devices)), devices)
    abstract_state = jax.eval_shape(make_large_state)
    return sharding.place(abstract_state, sharding.of_state(abstract_state, mesh))


def place_large_state(placed: dict[str, Any]) -> dict[str, Any]:
    return jax.jit(make_large_state, out_shardings=jax.tree.map(lambda x: x.sharding, placed))()


def assert_same_parts(actual: Any, expected: Any) -> None:
    """Compares what this process holds of global arrays with arrays that it has whole."""
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        for shard in a.addressable_shards:
            np.testing.assert_array_equal(np.asarray(shard.data), np.asarray(b)[shard.index])


def bits(tree: Any) -> list[np.ndarray]:
    def raw(leaf: jax.Array) -> np.ndarray:
        leaf = jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
        return np.asarray(leaf)

    return [raw(leaf) for leaf in jax.tree.leaves(tree)]


def assert_same(actual: Any, expected: Any) -> None:
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
    for a, b in zip(bits(actual), bits(expected), strict=True):
        np.testing.assert_array_equal(a, b)


def largest_file(folder: Path) -> Path:
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)


def steps_on_disk(folder: Path) -> list[int]:
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit())
