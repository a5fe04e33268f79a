"""Self-Mamba and Cross-Mamba: which tokens see which."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sisma_jax.models.condition import Condition
from sisma_jax.models.mamba import CrossMamba, SelfMamba
from sisma_jax.models.scan_orders import orders_of_layer


@pytest.mark.parametrize("ssd_head", [None, 8])
@pytest.mark.parametrize("reverse", [False, True])
def test_self_mamba_follows_its_path(reverse, ssd_head):
    """What comes later on the path (beyond the convolution's reach) does not change what came before."""
    order = next(o for o in orders_of_layer(0, 4) if o.lines == "rows" and o.reverse == reverse)
    sizes = {"d_state": 4, "expand": 2, "d_conv": 3, "num_orders": 1, "ssd_head": ssd_head}
    mixer = SelfMamba(16, **sizes, dtype=jnp.dtype("float32"), rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (1, 6, 5, 16))
    path = order.path(6, 5)
    last_row = path.tokens[-1] // 5
    changed = x.at[0, last_row].add(1.0)
    mix = jax.jit(lambda x: mixer(x, None, (path,)))
    difference = np.abs(mix(changed) - mix(x)).max(axis=-1)[0]
    far = [row for row in range(6) if abs(row - last_row) > 1]
    np.testing.assert_array_equal(difference[far], 0)
    assert difference[last_row].min() > 1e-4


def test_cross_mamba_gradients_reach_both_streams():
    mixer = CrossMamba(
        16,
        wiring="state_from_mask",
        d_state=4,
        expand=2,
        d_conv=3,
        num_orders=2,
        dtype=jnp.dtype("float32"),
        rngs=nnx.Rngs(0),
    )
    keys = jax.random.split(jax.random.key(0), 2)
    x, features = (jax.random.normal(key, (1, 4, 4, 16)) for key in keys)
    paths = tuple(order.path(4, 4) for order in orders_of_layer(0, 2))

    def loss(x, features):
        return (mixer(x, mixer.read(Condition(features), paths), paths) ** 2).sum()

    grads = jax.jit(jax.grad(loss, argnums=(0, 1)))(x, features)
    assert all(np.abs(grad).max() > 1e-4 for grad in grads)
