"""The selective scan against values and gradients of other people's code (see `golden/make_selective_scan.py`)."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sisma_jax.kernels import selective_scan
from sisma_jax.kernels.selective_scan import api
from tests.kernels.scan_cases import FLOAT32, assert_close

GOLDEN = np.load(Path(__file__).parent / "golden" / "selective_scan.npz")
IMPLEMENTATIONS = tuple(name for name in api.IMPLEMENTATIONS if name not in api.SUPPORT_CHECKS)


def golden(peer: str, kind: str) -> dict[str, np.ndarray]:
    prefix = f"{peer}/{kind}/"
    return {key.removeprefix(prefix): GOLDEN[key] for key in GOLDEN if key.startswith(prefix)}


def computed(peer: str, implementation: str, dtype: str) -> dict[str, jax.Array]:
    """The same results by `selective_scan`, all inputs in `dtype`."""
    inputs, cotangents = (
        {name: jnp.asarray(x, dtype) for name, x in golden(peer, kind).items()} for kind in ("inputs", "cotangents")
    )

    def scan(inputs):
        y, final_state = selective_scan(
            **inputs, delta_softplus="delta_bias" in inputs, return_final_state=True, implementation=implementation
        )
        results = {"y": y, "final_state": final_state}
        return {name: results[name] for name in cotangents}

    @jax.jit
    def results(inputs, cotangents):
        values, vjp = jax.vjp(scan, inputs)
        (gradients,) = vjp(cotangents)
        return values | {f"d {name}": gradient for name, gradient in gradients.items()}

    return results(inputs, cotangents)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("peer", ["mambapy", "transformers", "state-spaces"])
def test_values_and_gradients_are_those_of_the_peer(peer, implementation):
    # FLOAT32 is for one float32 computation against an exact one. State-spaces' loop is another in float32.
    tolerance = {name: (2 if peer == "state-spaces" else 1) * value for name, value in FLOAT32.items()}
    assert_close(computed(peer, implementation, "float32"), golden(peer, "results"), **tolerance)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_in_float64_values_and_gradients_are_those_of_mambapy(implementation):
    # Both sides in float64, which rounds to 1e-16, over sums of some hundred terms.
    with jax.enable_x64(True):
        assert_close(
            computed("mambapy", implementation, "float64"),
            golden("mambapy", "results"),
            value_tolerance=1e-13,
            gradient_tolerance=1e-13,
        )


@pytest.mark.parametrize("peer", ["mambapy", "transformers", "state-spaces"])
def test_the_file_says_which_package_made_it(peer):
    assert "torch" in str(GOLDEN[f"{peer}/source"])
