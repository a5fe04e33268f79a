"""Self-Mamba and Cross-Mamba with SSD: with tied decays they are those with the selective scan."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sisma_jax.models.condition import Condition
from sisma_jax.models.mamba import CrossMamba, OrderedScan, SelfMamba
from sisma_jax.models.scan_orders import ORDERS, orders_of_layer
from sisma_jax.models.ssd import OrderedSsd
from tests.models.test_denoiser import TINY, make_inputs, make_model, predict

# Four heads, as many as the rank of Δ, so that a scan can have the same Δ.
D_MODEL, D_HEAD, HEADS = 64, 16, 4
SIZES = {"d_state": 3, "expand": 1, "d_conv": 3, "dtype": jnp.dtype("float32")}
SSD = dataclasses.replace(TINY, mixer="ssd", d_head=8)
HEIGHT, WIDTH = 6, 8  # 48 tokens: more than a chunk

MIXERS = {
    "self": SelfMamba,
    "state_from_mask": functools.partial(CrossMamba, wiring="state_from_mask"),
    "readout_from_mask": functools.partial(CrossMamba, wiring="readout_from_mask"),
}


def tie(scan: OrderedScan, to: OrderedSsd) -> None:
    """Gives the scan the parameters with which every channel and state of a head decays as in SSD."""
    d_inner, d_state = scan.A_log.shape
    channel_of_head = jnp.repeat(jnp.eye(HEADS), D_HEAD, axis=1)
    assert scan.dt_rank == HEADS
    scan.drive_proj.kernel.set_value(to.drive_proj.kernel[...])
    scan.readout_proj.kernel.set_value(to.readout_proj.kernel[...])
    scan.dt_proj.set_value(channel_of_head)
    scan.dt_bias.set_value(to.dt_bias[...] @ channel_of_head)
    scan.A_log.set_value(jnp.broadcast_to((to.A_log[...] @ channel_of_head)[:, None], (d_inner, d_state)))
    scan.D.set_value(to.D[...])


@pytest.mark.parametrize("orders", [(order,) for order in ORDERS["interleaved"]] + [orders_of_layer(0, 4)], ids=str)
@pytest.mark.parametrize("mixer", MIXERS)
def test_tied_decays_are_a_selective_scan(mixer, orders):
    make = functools.partial(MIXERS[mixer], D_MODEL, num_orders=len(orders), **SIZES)
    with_ssd, with_scan = make(ssd_head=D_HEAD, rngs=nnx.Rngs(0)), make(rngs=nnx.Rngs(0))
    for name in ("in_proj", "conv", "out_norm", "out_proj", *(["mask_proj"] if mixer != "self" else [])):
        setattr(with_scan, name, getattr(with_ssd, name))
    for scan, ssd in zip(with_scan.scans, with_ssd.scans, strict=True):
        ssd.D.set_value(jax.random.normal(jax.random.key(4), ssd.D.shape))
        tie(scan, ssd)
    keys = jax.random.split(jax.random.key(0), 3)
    x, features, cotangent = (jax.random.normal(key, (2, HEIGHT, WIDTH, D_MODEL)) for key in keys)
    paths = tuple(order.path(HEIGHT, WIDTH) for order in orders)

    def mixed(mixer, x, features):
        return mixer(x, mixer.read(Condition(features), paths), paths)

    @functools.partial(jax.jit, static_argnums=0)
    def run(graph, params, x, features):
        y, pullback = jax.vjp(lambda x, features: mixed(nnx.merge(graph, params), x, features), x, features)
        return y, *pullback(cotangent)

    got, wanted = (run(*nnx.split(module), x, features) for module in (with_ssd, with_scan))
    for each, other in zip(got, wanted, strict=True):
        # Float32, some hundred roundings in another order; gradients pass the norm, which divides by small deviations.
        np.testing.assert_allclose(each, other, rtol=1e-4, atol=1e-4 * np.abs(other).max())
    of_mask = got[2]
    assert np.any(of_mask) == (mixer != "self")


def test_initial_step_sizes_and_decays_are_those_of_mamba2():
    ssd = OrderedSsd(512, 4, 1, dtype=jnp.dtype("float32"), rngs=nnx.Rngs(0))
    step_sizes, rates = jax.nn.softplus(ssd.dt_bias[...]), jnp.exp(ssd.A_log[...])
    assert ssd.dt_bias.shape == ssd.A_log.shape == (512,)
    assert 0.99e-3 < step_sizes.min() < 2e-3 < 5e-2 < step_sizes.max() < 1.01e-1
    assert 0.99 < rates.min() < 1.2 < 15.8 < rates.max() < 16.01


def test_a_sharded_sequence_is_refused():
    ssd = OrderedSsd(8, 2, 4, dtype=jnp.dtype("float32"), rngs=nnx.Rngs(0))
    x = jnp.ones((1, 4, 4, 8))
    with pytest.raises(NotImplementedError, match="SSD does not support a mesh with an axis seq"):
        ssd.to_sequence(x, orders_of_layer(0, 1)[0].split_path(4, 4, 2))


@pytest.mark.parametrize("wiring", ["state_from_mask", "readout_from_mask"])
def test_the_mask_changes_the_output_and_only_through_cross_mamba(wiring):
    model = make_model(dataclasses.replace(SSD, cross_wiring=wiring, orders_per_layer=2))
    xt, t, mask = make_inputs()
    other = (mask + 1) % 19
    assert np.abs(predict(model, xt, t, mask) - predict(model, xt, t, other)).max() > 1e-3
    kernel = model.layers.stacked.reader.out_proj.kernel
    kernel[...] = jnp.zeros_like(kernel[...])
    np.testing.assert_array_equal(predict(model, xt, t, mask), predict(model, xt, t, other))


def test_bfloat16_computes_close_to_float32_with_float32_parameters():
    xt, t, mask = make_inputs()
    rough = make_model(SSD, dtype=jnp.bfloat16)
    assert {x.dtype for x in jax.tree.leaves(nnx.split(rough)[1])} == {jnp.dtype("float32")}
    want, got = predict(make_model(SSD), xt, t, mask), predict(rough, xt, t, mask)
    # bfloat16 keeps 8 bits: each of some ten roundings in a row errs by up to 0.4 percent of its scale.
    assert np.abs(got - want).max() < 0.05 * np.abs(want).max()


def test_rematerialisation_changes_no_gradient():
    xt, t, mask = make_inputs()

    def gradient(remat):
        graph, params = nnx.split(make_model(dataclasses.replace(SSD, remat=remat)))

        def loss(params):
            model = nnx.merge(graph, params)
            return (model(xt, t, model.encode({"mask": mask})) ** 2).mean()

        return nnx.to_pure_dict(jax.jit(jax.grad(loss))(params))

    none, dots, full = (gradient(remat) for remat in ("none", "dots", "full"))
    for recomputed in (dots, full):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6), none, recomputed)
