"""Counts the floating-point operations of a traced function, before compilation, as a total over all devices.

The compiler's count (`cost_analysis`) includes the body of a loop only once, and our model runs its layers in a loop.
"""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
from jax.core import ShapedArray
from jax.extend import core


@dataclasses.dataclass(frozen=True)
class Flops:
    """Numbers of floating-point operations, including recomputation in the backward pass.

    Attributes:
      matmul: matrix products and convolutions; two per multiplication.
      kernels: Pallas kernels, from their own cost estimates.
      elementwise: elementwise arithmetic and functions such as exp, one per entry of the result; and reductions, one
        per entry of the argument.
    """

    matmul: int = 0
    kernels: int = 0
    elementwise: int = 0

    @property
    def total(self) -> int:
        """All operations."""
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
    """Returns the numbers of operations of a traced function.

    Of a conditional, only the branch with the most operations counts. Of a loop whose length is not known
    (`jax.lax.while_loop`), one iteration counts.

    Args:
      jaxpr: `jax.jit(f).trace(...).jaxpr`.
    """
    jaxpr = jaxpr.jaxpr if isinstance(jaxpr, core.ClosedJaxpr) else jaxpr
    return sum((_count_equation(equation) for equation in jaxpr.eqns), Flops())


def _count_equation(equation: core.JaxprEqn) -> Flops:
    name, params = equation.primitive.name, equation.params
    entries = sum(math.prod(_shape(x)) for x in equation.outvars)
    match name:
        case "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            shape = _shape(equation.invars[0])
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
            # The inner function computes the part of one device.
            parts = math.prod(params["mesh"].shape[axis] for axis in params["newly_manual_axes"])
            return count(params["jaxpr"]) * parts
        case _ if name in _ELEMENTWISE and _is_float(equation.outvars[0]):
            return Flops(elementwise=entries)
        case _ if name in _REDUCTIONS and _is_float(equation.invars[0]):
            return Flops(elementwise=math.prod(_shape(equation.invars[0])))
        case _:
            return sum((count(inner) for inner in inner_functions(params)), Flops())


def _products_per_output(equation: core.JaxprEqn) -> int:
    """The number of multiplications per entry of a convolution's result."""
    kernel, numbers = _shape(equation.invars[1]), equation.params["dimension_numbers"]
    _, inputs, *window = numbers.rhs_spec
    return math.prod(kernel[axis] for axis in (inputs, *window))


def _shape(x: core.Var | core.Literal) -> tuple[int, ...]:
    """The shape of an array; () for a value of another kind, such as a token."""
    return x.aval.shape if isinstance(x.aval, ShapedArray) else ()


def _is_float(x: core.Var | core.Literal) -> bool:
    return isinstance(x.aval, ShapedArray) and jnp.issubdtype(x.aval.dtype, jnp.floating)


def inner_functions(params: dict[str, Any]) -> list[core.Jaxpr | core.ClosedJaxpr]:
    """Returns the functions that an equation calls, without derivative rules, which are counted where they run.

    Args:
      params: of the equation.
    """
    values = [value for name, value in params.items() if not name.endswith(("jvp_jaxpr_fun", "fwd_jaxpr_thunk"))]
    flat = [x for value in values for x in (value if isinstance(value, tuple | list) else [value])]
    return [x for x in flat if isinstance(x, core.Jaxpr | core.ClosedJaxpr)]
