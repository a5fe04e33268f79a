"""The examples of kernels/README.md run, and the folder works alone."""

import re
import shutil
import subprocess
import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sisma_jax.kernels import selective_scan
from tests.processes import ROOT

BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "kernels/README.md").read_text(), re.S)
CHANNELS, STATES = 8, 4


def run(block: str, **names) -> dict:
    names = {"jax": jax, "jnp": jnp, "nnx": nnx, "eqx": eqx, "selective_scan": selective_scan} | names
    exec(block, names)
    return names


def test_the_example_of_plain_jax():
    keys = jax.random.split(jax.random.key(0), 7)
    u, delta, z = (jax.random.normal(key, (2, 5, CHANNELS)) for key in keys[:3])
    B, C = (jax.random.normal(key, (2, 5, STATES)) for key in keys[3:5])
    D, delta_bias = (jax.random.normal(key, (CHANNELS,)) for key in keys[5:])
    A = -jnp.exp(jax.random.normal(keys[0], (CHANNELS, STATES)))
    names = {"u": u, "delta": delta, "A": A, "B": B, "C": C, "D": D, "z": z, "delta_bias": delta_bias}
    y = run(BLOCKS[0], **names)["y"]
    want = selective_scan(**names, delta_softplus=True, implementation="reference")
    np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-5)


def test_the_modules_of_flax_and_equinox_are_the_same():
    u = jax.random.normal(jax.random.key(1), (2, 5, CHANNELS))
    flax = run(BLOCKS[1])["Scan"](CHANNELS, STATES, nnx.Rngs(0))
    equinox = run(BLOCKS[2])["Scan"](CHANNELS, STATES, jax.random.key(0))
    linear = flax.delta_B_C
    equinox = eqx.tree_at(
        lambda module: (module.A_log, module.delta_B_C.weight, module.delta_B_C.bias),
        equinox,
        (flax.A_log[...], linear.kernel[...].T, linear.bias[...]),
    )
    y = flax(u)
    assert y.shape == u.shape
    np.testing.assert_allclose(jax.vmap(equinox)(u), y, rtol=1e-5, atol=1e-5)
    gradient = eqx.filter_grad(lambda module: jax.vmap(module)(u).sum())(equinox)
    assert float(jnp.abs(gradient.A_log).max()) > 0


def test_the_policy_of_the_example_keeps_the_scan():
    block = next(block for block in BLOCKS if "policy" in block)
    from sisma_jax.kernels.selective_scan import CHECKPOINT_NAME

    assert callable(run(block, CHECKPOINT_NAME=CHECKPOINT_NAME)["policy"])


def test_the_folder_works_alone(tmp_path):
    shutil.copytree(ROOT / "kernels", tmp_path / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    program = (
        "import sys; sys.modules['sisma_jax'] = None\n"
        "import jax.numpy as jnp; from kernels import selective_scan\n"
        "x = jnp.ones((1, 3, 2)); print(selective_scan(x, x, -x[0, :2].T @ x[0, :2], x, x).shape)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "(1, 3, 2)"
