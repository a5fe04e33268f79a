"""Floating-point operations of a traced function, all devices together, counted before any compiler has seen it.

A compiler's own count (`cost_analysis`) takes the body of a loop once, and ours has all layers in a loop.
"""

import dataclasses
import math
from typing import Any

import jax
from jax.extend import core


@dataclasses.dataclass(frozen=True)
class Flops:
    """What is computed, recomputation in the backward pass included.

    Attributes:
      matmul: of matrix products and convolutions, two for each multiplication.
      kernels: of the Pallas kernels, by their own estimates.
      elementwise: one for each entry that arithmetic, or a function such as exp, makes, or a sum takes.
    """

    matmul: int = 0
    kernels: int = 0
    elementwise: int = 0

    @property
    def total(self) -> int:
        return self.matmul + self.kernels + self.elementwise

    def __add__(self, other: "Flops") -> "Flops":
        return Flops(self.matmul + other.matmul, self.kernels + other.kernels, self.elementwise + other.elementwise)

    def __mul__(self, times: int) -> "Flops":
        return Flops(times * self.matmul, times * self.kernels, times * self.elementwise)


_ELEMENTWISE = frozenset(
    "add sub mul div rem neg abs sign max min pow integer_pow square sqrt rsqrt cbrt exp exp2 expm1 log log1p sin cos "
    "tan tanh logistic erf erfc erf_inv floor ceil round clamp select_n add_any".split()
)
_REDUCTIONS = frozenset("reduce_sum reduce_max reduce_min reduce_prod cumsum cumprod cummax argmax argmin".split())


def count(jaxpr: core.Jaxpr | core.ClosedJaxpr) -> Flops:
    """Returns the operations of a traced function (`jax.jit(f).trace(...).jaxpr`).

    Of a conditional the costliest branch counts, and of a loop without a known length (`jax.lax.while_loop`) one
    iteration.
    """
    jaxpr = jaxpr.jaxpr if isinstance(jaxpr, core.ClosedJaxpr) else jaxpr
    return sum((_count_equation(equation) for equation in jaxpr.eqns), Flops())


def _count_equation(equation: core.JaxprEqn) -> Flops:
    name, params = equation.primitive.name, equation.params
    entries = sum(math.prod(x.aval.shape) for x in equation.outvars)
    match name:
        case "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            return Flops(matmul=2 * entries * math.prod(shape[axis] for axis in contracted))
        case "conv_general_dilated":
            return Flops(matmul=2 * entries * _products_per_output(equation))
        case "pallas_call":
            estimate = params["cost_estimate"]
            return Flops(kernels=estimate.flops + estimate.transcendentals if estimate else 0)
        case "scan":
            return count(params["jaxpr"]) * params["length"]
        case "cond":
            return max((count(branch) for branch in params["branches"]), key=lambda flops: flops.total)
        case "shard_map":
            # What is inside is for one device's part.
            parts = math.prod(params["mesh"].shape[axis] for axis in params["newly_manual_axes"])
            return count(params["jaxpr"]) * parts
        case _ if name in _ELEMENTWISE and _is_float(equation.outvars[0].aval):
            return Flops(elementwise=entries)
        case _ if name in _REDUCTIONS and _is_float(equation.invars[0].aval):
            return Flops(elementwise=math.prod(equation.invars[0].aval.shape))
    return sum((count(inner) for inner in _inner(params)), Flops())


def _products_per_output(equation: core.JaxprEqn) -> int:
    kernel, numbers = equation.invars[1].aval.shape, equation.params["dimension_numbers"]
    _, inputs, *window = numbers.rhs_spec
    return math.prod(kernel[axis] for axis in (inputs, *window))


def _is_float(aval: Any) -> bool:
    return jax.dtypes.issubdtype(getattr(aval, "dtype", None), jax.numpy.floating)


def _inner(params: dict[str, Any]) -> list[core.Jaxpr | core.ClosedJaxpr]:
    """The functions that an equation calls, derivative rules left out: these are in the program where they are used."""
    values = [value for name, value in params.items() if not name.endswith(("jvp_jaxpr_fun", "fwd_jaxpr_thunk"))]
    flat = [x for value in values for x in (value if isinstance(value, tuple | list) else [value])]
    return [x for x in flat if isinstance(x, core.Jaxpr | core.ClosedJaxpr)]
