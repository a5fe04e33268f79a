"""Problems for the selective scan at the sizes of the models, and their results in float64, computed on the host."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sisma_jax.kernels import selective_scan
from sisma_jax.kernels.selective_scan import api

Arrays = dict[str, np.ndarray]
"""NumPy arrays by name, float64."""

DTYPES = ("float32", "bfloat16")
SEQUENCES = ("u", "delta", "B", "C", "z")
"""Arguments whose dtype is that of the activations. The others are parameters and states, which are float32."""

_CHANNELS_PER_SLICE = 256
_CHANNEL_AXIS = {"u": 2, "delta": 2, "z": 2, "y": 2, "A": 0, "D": 0, "delta_bias": 0, "initial_state": 1}
_CHANNEL_AXIS |= {"final_state": 1}


@dataclasses.dataclass(frozen=True)
class ScanCase:
    """A problem with the arguments that the denoiser passes: u, delta, A, B, C, D and delta_bias, with a softplus.

    Attributes:
      batch: number of sequences.
      length: tokens per sequence.
      d_inner: channels.
      d_state: states per channel.
      reverse: scan from the last token to the first.
      with_options: pass z and initial_state, too.
    """

    batch: int
    length: int
    d_inner: int
    d_state: int = 16
    reverse: bool = False
    with_options: bool = False

    def __str__(self) -> str:
        name = f"scan {self.batch}x{self.length}x{self.d_inner}, N={self.d_state}"
        return name + ", reversed" * self.reverse + ", z and initial state" * self.with_options

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Returns the shapes of the arguments by name."""
        by_channel, by_state = (self.batch, self.length, self.d_inner), (self.batch, self.length, self.d_state)
        shapes: dict[str, tuple[int, ...]] = {"u": by_channel, "delta": by_channel, "A": (self.d_inner, self.d_state)}
        shapes |= {"B": by_state, "C": by_state, "D": (self.d_inner,), "delta_bias": (self.d_inner,)}
        if self.with_options:
            shapes |= {"z": by_channel, "initial_state": (self.batch, self.d_inner, self.d_state)}
        return shapes

    def inputs(self) -> Arrays:
        """Returns the arguments, of which sequences are exact in bfloat16, so that each dtype poses the same problem.

        A and delta_bias have the values with which Mamba's layers are initialised: most states decay slowly.
        """
        rng = np.random.default_rng(0)
        step = np.exp(rng.uniform(np.log(1e-3), np.log(1e-1), self.d_inner))
        arrays: Arrays = {name: rng.standard_normal(shape, np.float32) for name, shape in self.shapes().items()}
        arrays["A"] = -np.tile(np.arange(1.0, self.d_state + 1)[None], (self.d_inner, 1))
        arrays["delta_bias"] = step + np.log(-np.expm1(-step))  # the inverse of softplus
        return {name: rounded(x, "bfloat16" if name in SEQUENCES else "float32") for name, x in arrays.items()}

    def cotangents(self) -> Arrays:
        """Returns random cotangents of y and of the final state."""
        rng = np.random.default_rng(1)
        return {
            "y": rounded(rng.standard_normal((self.batch, self.length, self.d_inner), np.float32), "bfloat16"),
            "final_state": rounded(rng.standard_normal((self.batch, self.d_inner, self.d_state)), "float32"),
        }


def rounded(x: np.ndarray, dtype: str) -> np.ndarray:
    """Returns x in float64, rounded to the values of a dtype.

    Args:
      x: floating-point.
      dtype: float32 or bfloat16.
    """
    return x.astype(jnp.dtype(dtype)).astype(np.float64)


def on_device(arrays: Arrays, dtype: str) -> dict[str, jax.Array]:
    """Returns the arrays on the default device: sequences in a dtype, parameters and states in float32.

    Args:
      arrays: arguments of the scan, or cotangents, by name.
      dtype: of the sequences.
    """
    return {name: jnp.asarray(x, dtype if name in (*SEQUENCES, "y") else "float32") for name, x in arrays.items()}


def results(
    inputs: dict[str, jax.Array], cotangents: dict[str, jax.Array], *, reverse: bool, implementation: str
) -> dict[str, jax.Array]:
    """Returns {"y", "final_state", "d <argument>" for each argument}.

    Args:
      inputs: arguments of `selective_scan` by name.
      cotangents: of "y" and "final_state".
      reverse: as for `selective_scan`.
      implementation: as for `selective_scan`.
    """

    def scan(inputs: dict[str, Any]) -> tuple[jax.Array, jax.Array]:
        return selective_scan(
            **inputs, delta_softplus=True, reverse=reverse, return_final_state=True, implementation=implementation
        )

    (y, final_state), vjp = jax.vjp(scan, inputs)
    (gradients,) = vjp((cotangents["y"].astype(y.dtype), cotangents["final_state"].astype(final_state.dtype)))
    return {"y": y, "final_state": final_state} | {f"d {name}": x for name, x in gradients.items()}


@functools.partial(jax.jit, static_argnames="reverse")
def _reference(inputs: dict[str, jax.Array], cotangents: dict[str, jax.Array], reverse: bool) -> dict[str, jax.Array]:
    return results(inputs, cotangents, reverse=reverse, implementation="reference")


def expected(inputs: Arrays, cotangents: Arrays, reverse: bool) -> Arrays:
    """Returns what `results` should be: the recurrence step by step in float64, on the host's CPU.

    Channels are independent but for the gradients of B and C, which are sums over them. A slice of channels at a time
    bounds the memory of the states, which the reference keeps for its backward pass.

    Args:
      inputs: arguments of `selective_scan` by name.
      cotangents: of "y" and "final_state".
      reverse: as for `selective_scan`.
    """
    d_inner = inputs["A"].shape[0]
    parts: list[Arrays] = []
    with jax.enable_x64(True), jax.default_device(jax.local_devices(backend="cpu")[0]):
        for start in range(0, d_inner, _CHANNELS_PER_SLICE):
            channels = np.arange(start, min(start + _CHANNELS_PER_SLICE, d_inner))

            def sliced(arrays: Arrays, channels: np.ndarray = channels) -> Arrays:
                axes = _CHANNEL_AXIS
                return {name: x.take(channels, axes[name]) if name in axes else x for name, x in arrays.items()}

            part = _reference(sliced(inputs), sliced(cotangents), reverse)
            parts.append({name: np.asarray(x, np.float64) for name, x in part.items()})

    def joined(name: str) -> np.ndarray:
        arrays, axis = [part[name] for part in parts], _CHANNEL_AXIS.get(name.removeprefix("d "))
        return np.sum(arrays, axis=0) if axis is None else np.concatenate(arrays, axis)

    return {name: joined(name) for name in parts[0]}


def chosen_implementation(case: ScanCase, dtype: str) -> str:
    """Returns the name of the implementation that `implementation=None` selects on the default backend.

    Args:
      case: the problem.
      dtype: of the sequences.
    """
    shapes: dict[str, Any] = {
        name: jax.ShapeDtypeStruct(shape, dtype if name in SEQUENCES else "float32")
        for name, shape in case.shapes().items()
    }
    for name in api.kernels_for_device():
        try:
            api.SUPPORT_CHECKS[name](**shapes)
        except NotImplementedError:
            continue
        return name
    return api.PREFERENCE.get(jax.default_backend(), ("xla",))[-1]
