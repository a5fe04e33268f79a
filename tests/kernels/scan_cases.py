"""Problems for the selective scan, their exact results, and how close an implementation must come."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from sisma_jax.kernels import selective_scan

ARGUMENTS = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state")


Implementation = str | Callable
"""A name for `selective_scan`, or a function that returns (y, final_state)."""


@dataclasses.dataclass(frozen=True)
class Case:
    """A problem's sizes and options; hashable, so that expected results are computed once."""

    batch: int
    length: int
    d_inner: int
    d_state: int
    optional: tuple[str, ...] = ("D", "z", "delta_bias", "initial_state")
    delta_softplus: bool = True
    reverse: bool = False
    dtype: str = "float32"

    def inputs(self) -> dict[str, np.ndarray]:
        """Arguments in float64, whose values are exact in `dtype` so that every precision solves the same problem."""
        rng = np.random.default_rng(0)
        batch, length, d_inner, d_state = self.batch, self.length, self.d_inner, self.d_state
        delta = rng.normal(size=(batch, length, d_inner)) - 1
        arrays = {
            "u": rng.normal(size=(batch, length, d_inner)),
            "delta": delta if self.delta_softplus else np.exp(delta),
            "A": -np.exp(rng.normal(size=(d_inner, d_state))),
            "B": rng.normal(size=(batch, length, d_state)),
            "C": rng.normal(size=(batch, length, d_state)),
            "D": rng.normal(size=d_inner),
            "z": rng.normal(size=(batch, length, d_inner)),
            "delta_bias": rng.normal(size=d_inner) if self.delta_softplus else np.abs(rng.normal(size=d_inner)),
            "initial_state": rng.normal(size=(batch, d_inner, d_state)),
        }
        kept = {name: x for name, x in arrays.items() if name in ARGUMENTS[:5] or name in self.optional}
        return {name: _round(x, self.dtype_of(name)) for name, x in kept.items()}

    def cotangents(self) -> tuple[np.ndarray, np.ndarray]:
        """Random weights of y and of the final state in the loss."""
        rng = np.random.default_rng(1)
        dy = rng.normal(size=(self.batch, self.length, self.d_inner))
        return _round(dy, self.dtype), _round(rng.normal(size=(self.batch, self.d_inner, self.d_state)), "float32")

    def dtype_of(self, name: str) -> str:
        """A model computes sequences in `dtype` and keeps its parameters and the state in float32."""
        return self.dtype if name in ("u", "delta", "B", "C", "z") else "float32"

    def scan(self, implementation: Implementation, inputs):
        options = dict(delta_softplus=self.delta_softplus, reverse=self.reverse)
        if callable(implementation):
            return implementation(**inputs, **options)
        return selective_scan(**inputs, **options, return_final_state=True, implementation=implementation)

    def results(self, implementation: Implementation, inputs, cotangents):
        """{"y", "final_state", "d <argument>" for every argument}; may be compiled."""
        (y, final_state), vjp = jax.vjp(functools.partial(self.scan, implementation), inputs)
        dy, d_final_state = cotangents
        (gradients,) = vjp((dy.astype(y.dtype), d_final_state.astype(final_state.dtype)))
        return {"y": y, "final_state": final_state} | {f"d {name}": gradient for name, gradient in gradients.items()}

    def computed(self, implementation: Implementation, jit: bool = True):
        inputs = {name: jnp.asarray(x, self.dtype_of(name)) for name, x in self.inputs().items()}
        cotangents = tuple(jnp.asarray(x, "float32") for x in self.cotangents())
        function = functools.partial(self.results, implementation)
        return (jax.jit(function) if jit else function)(inputs, cotangents)


@functools.cache
def expected_results(case: Case):
    """The step-by-step reference in float64; that it is right is the first test's business."""
    with jax.enable_x64(True):
        inputs, cotangents = jax.tree.map(lambda x: jnp.asarray(x, "float64"), (case.inputs(), case.cotangents()))
        return jax.tree.map(np.asarray, jax.jit(functools.partial(case.results, "reference"))(inputs, cotangents))


def _round(x, dtype):
    return np.asarray(jnp.asarray(x, dtype), np.float64)


def assert_close(computed, expected, value_tolerance, gradient_tolerance):
    """Errors relative to each array's largest entry, since a sum's rounding follows its largest terms."""
    assert computed.keys() == expected.keys()
    for name, wanted in expected.items():
        got = np.asarray(computed[name], np.float64)
        assert got.shape == wanted.shape, name
        tolerance = gradient_tolerance if name.startswith("d ") else value_tolerance
        scale = np.max(np.abs(wanted), initial=0.0)
        error = np.max(np.abs(got - wanted), initial=0.0)
        assert error <= tolerance * scale, f"{name}: relative error {error / scale:.1e}, tolerance {tolerance:.1e}"


# Float32 rounds to 6e-8. States forget, so that an entry adds up the roundings of some ten steps and d_state products;
# gradients of A, D and delta_bias add up batch times length terms more.
FLOAT32 = dict(value_tolerance=2e-6, gradient_tolerance=5e-6)
# Everything inside is float32, and an entry is rounded on its way out, to 2^-8 of itself. The gradient of u is rounded
# three times: it adds those of the recurrence and of the skip.
BFLOAT16 = dict(value_tolerance=2**-8 + 1e-5, gradient_tolerance=3 * 2**-8 + 1e-5)

CASES = {
    "bare": Case(2, 33, 24, 5, optional=(), delta_softplus=False),
    "bare, reversed": Case(2, 33, 24, 5, optional=(), delta_softplus=False, reverse=True),
    "all options": Case(2, 71, 24, 5),
    "all options, reversed": Case(2, 71, 24, 5, reverse=True),
    "one step": Case(2, 1, 6, 3),
    "one example, one channel, one state": Case(1, 35, 1, 1),
    "whole chunks": Case(1, 64, 16, 8),
    "D only": Case(1, 9, 6, 3, optional=("D",)),
    "z only": Case(1, 9, 6, 3, optional=("z",), delta_softplus=False),
    "delta_bias only": Case(1, 9, 6, 3, optional=("delta_bias",), delta_softplus=False),
    "initial_state only": Case(1, 9, 6, 3, optional=("initial_state",), reverse=True),
}


EXTREME_DECAYS = {"forgets at once": 1e4, "hardly forgets": 1e-7}


def assert_right_at_extreme_decays(scan: Callable, decay: float, length: int = 16384):
    """Values and gradients of scan(u, delta, A, B, C), y, over a long sequence, against float64."""
    d_inner, d_state = 4, 2
    rng = np.random.default_rng(0)
    u, delta = rng.normal(size=(2, 1, length, d_inner))
    B, C = rng.normal(size=(2, 1, length, d_state))
    A = np.full((d_inner, d_state), -decay)
    inputs = [np.asarray(x, np.float32) for x in (u, np.exp(delta - 3), A, B, C)]
    dy = np.asarray(rng.normal(size=u.shape), np.float32)

    def value_and_gradients(scan, dy, inputs):
        y, vjp = jax.vjp(scan, *inputs)
        return y, *vjp(dy)

    computed = jax.jit(functools.partial(value_and_gradients, scan))(dy, inputs)
    with jax.enable_x64(True):
        reference = functools.partial(selective_scan, implementation="reference")
        dy, inputs = jax.tree.map(lambda x: jnp.asarray(x, "float64"), (dy, inputs))
        expected = jax.jit(functools.partial(value_and_gradients, reference))(dy, inputs)
    for name, *arrays in zip(("y", "u", "delta", "A", "B", "C"), computed, expected, strict=True):
        got, wanted = (np.asarray(x, np.float64) for x in arrays)
        assert np.all(np.isfinite(got)), name
        # A state that hardly forgets is a random walk of 16,384 terms, each rounded: 1e-7 · sqrt(16384) · a few.
        # The float64 gradient of A is exactly zero where exp underflows, and then the scale is the smallest float.
        scale = np.max(np.abs(wanted)) + np.finfo(np.float32).tiny
        assert np.max(np.abs(got - wanted)) <= 1e-4 * scale, name
