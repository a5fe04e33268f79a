"""Self-Mamba on a line of tokens against the Mamba mixer of transformers (see `golden/make_mamba_mixer.py`)."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sisma_jax.models.mamba import SelfMamba
from sisma_jax.models.scan_orders import ScanOrder

GOLDEN = np.load(Path(__file__).parent / "golden" / "mamba_mixer.npz")


def run(weights: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    """Self-Mamba with the weights of the peer.

    Two details differ and are undone: the peer convolves causally, which is a 7 x 7 kernel on one row of tokens with
    the four taps in the left half of its middle row; and it has no norm after the scan.
    """
    d_inner, d_state = weights["A_log"].shape
    dt_rank = weights["dt_proj.weight"].shape[1]
    options = {"d_state": d_state, "expand": 2, "d_conv": 7, "num_orders": 1}
    mixer = nnx.eval_shape(lambda: SelfMamba(x.shape[-1], **options, dtype=jnp.dtype("float32"), rngs=nnx.Rngs(0)))
    (scan,) = mixer.scans
    drive, readout = jnp.split(weights["x_proj.weight"].T, [dt_rank + d_state], axis=1)
    values = (
        (mixer.in_proj.kernel, weights["in_proj.weight"].T),
        (mixer.conv.kernel, jnp.zeros((7, 7, d_inner)).at[3, :4].set(weights["conv1d.weight"][:, 0].T)),
        (mixer.conv.bias, weights["conv1d.bias"]),
        (scan.drive_proj.kernel, drive),
        (scan.readout_proj.kernel, readout),
        (scan.dt_proj, weights["dt_proj.weight"].T),
        (scan.dt_bias, weights["dt_proj.bias"]),
        (scan.A_log, weights["A_log"]),
        (scan.D, weights["D"]),
        (mixer.out_proj.kernel, weights["out_proj.weight"].T),
    )
    for param, value in values:
        assert param.shape == value.shape
        param.set_value(value)
    mixer.out_norm = lambda y: y
    length = x.shape[1]
    path = ScanOrder("rows", "odd", reverse=False).path(1, length)
    return mixer(x[:, None], None, (path,))[:, 0]


@pytest.fixture(scope="module")
def computed() -> dict[str, jax.Array]:
    weights = {name.removeprefix("weights/"): GOLDEN[name] for name in GOLDEN if name.startswith("weights/")}

    @jax.jit
    def results(weights, x, cotangent):
        y, pullback = jax.vjp(run, weights, x)
        of_weights, of_x = pullback(cotangent)
        return {"y": y, "d x": of_x} | {f"d {name}": gradient for name, gradient in of_weights.items()}

    return results(weights, GOLDEN["x"], GOLDEN["cotangent"])


@pytest.mark.parametrize("name", [name for name in GOLDEN if name == "y" or name.startswith("d ")])
def test_results_and_gradients_are_those_of_transformers(computed, name):
    want = GOLDEN[name]
    np.testing.assert_allclose(computed[name], want, rtol=1e-4, atol=1e-5 * np.abs(want).max())
