"""Functions with their own gradient that support every transformation of JAX, in any order.

`jax.custom_vjp` gives a function an efficient gradient, but takes away its forward mode. Here a function gets its
derivative by `jax.custom_jvp`, as a linear map that knows its transpose. Forward mode evaluates the map, and reverse
mode transposes it. The map is a primitive, because `jax.custom_derivatives.linear_call` supports neither `jax.vmap` nor
derivatives with respect to its residuals.
"""

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero
from jax.extend import core
from jax.interpreters import ad, batching, mlir

from .partition import vary_alike
from .typing import Array

Arrays = TypeVar("Arrays")
Outputs = TypeVar("Outputs")
Saved = TypeVar("Saved")
Residuals = TypeVar("Residuals")
Linear = TypeVar("Linear")


def with_gradient(
    evaluate: Callable[[Arrays], Outputs],
    save: Callable[[Arrays], tuple[Outputs, Saved]],
    gradient: Callable[[Arrays, Saved, Outputs], Any],
    plain: Callable[[Arrays], Outputs] | None = None,
    name: str | None = None,
) -> Callable[[Arrays], Outputs]:
    """Returns `evaluate` with its own gradient, which can be transformed and differentiated again.

    Reverse mode runs `save` and `gradient`. Forward mode runs `save` and the tangent of `plain`. Higher derivatives are
    those of `plain`. The functions must not close over traced arrays.

    Args:
      evaluate: the function, from a pytree of arrays to a pytree of floating-point arrays.
      save: from arrays to (evaluate(arrays), what `gradient` needs besides the arrays). JAX does not differentiate it.
      gradient: from (arrays, saved, gradients of the outputs) to the gradients of the arrays, with their structure,
        shapes and dtypes; None for an array of integers or booleans. JAX does not differentiate it.
      plain: the same function as `evaluate`, of operations that JAX differentiates; `evaluate` itself if None.
      name: of what `save` returns, for the policies of `jax.checkpoint` (see `jax.ad_checkpoint.checkpoint_name`). With
        a policy that keeps this name, `save` runs once. No name if None.
    """
    plain = evaluate if plain is None else plain

    @jax.custom_jvp
    def function(arrays: Arrays) -> Outputs:
        return evaluate(arrays)

    def function_rule(primals: tuple[Arrays], tangents: tuple[Any]) -> tuple[Outputs, Outputs]:
        # As a primitive, because reverse mode would otherwise take apart the loops in `save`: it would move what is the
        # same in all iterations out of them, into memory.
        outputs, saved = linear_call(lambda inputs, _: save(*inputs), lambda *_: (), jax.lax.stop_gradient(primals), ())
        if name is not None:
            outputs, saved = jax.tree.map(lambda x: checkpoint_name(x, name), (outputs, saved))
        return differentiable(*primals, saved, outputs), derivative(*primals, saved, *tangents)

    # The outputs that `save` has computed, as a function of the arrays: a further derivative finds its rule here, and
    # nothing is computed twice.
    @jax.custom_jvp
    def differentiable(arrays: Arrays, saved: Saved, outputs: Outputs) -> Outputs:
        return outputs

    def differentiable_rule(
        primals: tuple[Arrays, Saved, Outputs], tangents: tuple[Any, Any, Any]
    ) -> tuple[Outputs, Outputs]:
        arrays, saved, _ = primals
        return differentiable(*primals), derivative(arrays, saved, tangents[0])

    def derivative(arrays: Arrays, saved: Saved, tangents: Any) -> Outputs:
        """The tangent of the outputs, linear in those tangents that are not symbolic zeros."""
        leaves, structure = jax.tree.flatten(arrays)
        tangents = structure.flatten_up_to(tangents)
        moving = _moving(tangents)

        def push(residuals: tuple[list[Array], Saved], moved: list[Array]) -> Outputs:
            return _tangent(lambda leaves: plain(structure.unflatten(leaves)), residuals[0], moving, moved)

        def pull(residuals: tuple[list[Array], Saved], cotangents: Outputs) -> list[Array]:
            leaves, saved = residuals
            gradients = structure.flatten_up_to(own_gradient(structure.unflatten(leaves), saved, cotangents))
            return [gradients[i] for i in moving]

        return linear_call(push, pull, (leaves, saved), [tangents[i] for i in moving])

    @jax.custom_jvp
    def own_gradient(arrays: Arrays, saved: Saved, cotangents: Outputs) -> Any:
        return gradient(arrays, saved, cotangents)

    def own_gradient_rule(primals: tuple[Arrays, Saved, Outputs], tangents: tuple[Any, Any, Any]) -> tuple[Any, Any]:
        # `saved` is a function of the arrays, which the plain gradient contains.
        arrays, _, cotangents = primals
        d_arrays, _, d_cotangents = tangents
        leaves, structure = jax.tree.flatten((arrays, cotangents))
        tangents = structure.flatten_up_to((d_arrays, d_cotangents))
        moving = _moving(tangents)
        moved = [tangents[i] for i in moving]
        tangent = _tangent(lambda leaves: plain_gradient(*structure.unflatten(leaves)), leaves, moving, moved)
        return own_gradient(*primals), tangent

    def plain_gradient(arrays: Arrays, cotangents: Outputs) -> Any:
        _, pullback = jax.vjp(plain, arrays)
        (gradients,) = pullback(cotangents)
        return jax.tree.map(lambda x: None if x.dtype == jax.dtypes.float0 else x, gradients)

    # With symbolic zeros, constant arguments add nothing to the cost of forward mode.
    function.defjvp(function_rule, symbolic_zeros=True)
    differentiable.defjvp(differentiable_rule, symbolic_zeros=True)
    own_gradient.defjvp(own_gradient_rule, symbolic_zeros=True)
    return lambda arrays: function(vary_alike(arrays))


def linear_call(
    apply: Callable[[Residuals, Linear], Outputs],
    transpose: Callable[[Residuals, Outputs], Linear],
    residuals: Residuals,
    linear: Linear,
) -> Outputs:
    """Returns apply(residuals, linear), whose transpose with respect to `linear` is `transpose`.

    All transformations are supported, in any order. Derivatives with respect to the residuals are those of `apply` and
    `transpose`.

    Args:
      apply: linear in its second argument, from pytrees of arrays to a pytree of arrays. It must not close over traced
        arrays; the same is true of `transpose`.
      transpose: the transpose of `apply` for given residuals, from cotangents of the result to those of `linear`.
      residuals: pytree of arrays.
      linear: pytree of floating-point arrays.
    """
    arguments, structure = jax.tree.flatten((residuals, linear))
    # Traced here, so that the abstract values of the result have the sharding and the varying axes that `apply` gives.
    jaxpr, shapes = jax.make_jaxpr(apply, return_shape=True)(residuals, linear)
    results = _linear_call_p.bind(
        *arguments,
        apply=apply,
        transpose=transpose,
        structure=structure,
        result_structure=jax.tree.structure(shapes),
        jaxpr=jaxpr,
    )
    return jax.tree.unflatten(jax.tree.structure(shapes), results)


# The rules below take and return leaves. Their keyword arguments are those of `bind` above.
_linear_call_p = core.Primitive("linear_call_with_transpose")
_linear_call_p.multiple_results = True


def _quiet(function: Callable[..., Outputs]) -> Callable[..., Outputs]:
    """The function, without JAX's warning, at the lowering of a kernel, that its Triton backend is deprecated."""

    @functools.wraps(function)
    def quiet(*arguments: Any, **params: Any) -> Outputs:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The Pallas Triton backend is deprecated", DeprecationWarning)
            return function(*arguments, **params)

    return quiet


@_quiet
def _run(*arguments: Any, jaxpr: core.ClosedJaxpr, **_: Any) -> list[Array]:
    return core.jaxpr_as_fun(jaxpr)(*arguments)


_linear_call_p.def_impl(_run)
mlir.register_lowering(_linear_call_p, _quiet(mlir.lower_fun(_run, multiple_results=True)))


@_linear_call_p.def_effectful_abstract_eval
def _abstract_results(*_: Any, jaxpr: core.ClosedJaxpr, **__: Any) -> tuple[Sequence[Any], core.Effects]:
    return jaxpr.out_avals, jaxpr.effects


def _jvp(primals: Sequence[Any], tangents: Sequence[Any], **params: Any) -> tuple[list[Array], list[Any]]:
    residuals, linear = jax.tree.unflatten(params["structure"], primals)
    residual_leaves, residual_structure = jax.tree.flatten(residuals)
    d_residuals, d_linear = tangents[: len(residual_leaves)], tangents[len(residual_leaves) :]
    results = _linear_call_p.bind(*primals, **params)
    d_results: list[Any] = [ad.Zero(jax.typeof(x).to_tangent_aval()) for x in results]
    if any(not isinstance(x, ad.Zero) for x in d_linear):
        moved = _linear_call_p.bind(*residual_leaves, *map(ad.instantiate_zeros, d_linear), **params)
        d_results = list(map(ad.add_tangents, d_results, moved))
    if moving := _moving(d_residuals):
        moved = _tangent(
            lambda leaves: params["apply"](residual_structure.unflatten(leaves), linear),
            residual_leaves,
            moving,
            [d_residuals[i] for i in moving],
        )
        d_results = list(map(ad.add_tangents, d_results, jax.tree.leaves(moved)))
    return results, d_results


ad.primitive_jvps[_linear_call_p] = _jvp


def _transpose(cotangents: Sequence[Any], *arguments: Any, **params: Any) -> list[Any]:
    residuals, _ = jax.tree.unflatten(params["structure"], arguments)
    structure = params["result_structure"]
    cotangents = structure.unflatten([ad.instantiate_zeros(x) for x in cotangents])
    gradients = linear_call(params["transpose"], params["apply"], residuals, cotangents)
    # Only the linear arguments have gradients, and of these only the ones that JAX asks for.
    is_asked = [ad.is_undefined_primal(x) for x in arguments]
    by_argument = [None] * jax.tree.structure(residuals).num_leaves + jax.tree.leaves(gradients)
    return [x if asked else None for x, asked in zip(by_argument, is_asked, strict=True)]


ad.primitive_transposes[_linear_call_p] = _transpose


def _batch(axis: Any, arguments: Sequence[Any], axes: Sequence[Any], **params: Any) -> tuple[list[Array], list[int]]:
    residuals, linear = jax.tree.unflatten(params["structure"], arguments)
    residual_axes, linear_axes = jax.tree.unflatten(params["structure"], axes)
    vmap = functools.partial(jax.vmap, axis_size=axis.size, axis_name=axis.name, spmd_axis_name=axis.spmd_name)
    # The linear arguments all get a batch axis, in front: the transpose of the map must not sum over it. The residuals
    # may be without.
    linear = vmap(lambda *x: x[0], in_axes=(linear_axes, axes))(linear, arguments)
    apply = vmap(params["apply"], in_axes=(residual_axes, 0))
    transpose = vmap(params["transpose"], in_axes=(residual_axes, 0))
    results = jax.tree.leaves(linear_call(apply, transpose, residuals, linear))
    return results, [0] * len(results)


batching.fancy_primitive_batchers[_linear_call_p] = _batch


def _moving(tangents: Sequence[Any]) -> list[int]:
    """The indices of the tangents that are not symbolic zeros."""
    return [i for i, x in enumerate(tangents) if not isinstance(x, ad.Zero | SymbolicZero)]


def _tangent(
    function: Callable[[Sequence[Any]], Outputs],
    primals: Sequence[Any],
    moving: Sequence[int],
    moved: Sequence[Any],
) -> Outputs:
    """The tangent of function(primals), where primals[i] for i in `moving` have the tangents `moved`."""

    def of_moving(arrays: Sequence[Any]) -> Outputs:
        leaves = list(primals)
        for i, x in zip(moving, arrays, strict=True):
            leaves[i] = x
        return function(leaves)

    return jax.jvp(of_moving, ([primals[i] for i in moving],), (list(moved),))[1]
