"""Transformations of JAX, applied to a function and to its plain counterpart in float64."""

import dataclasses
import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

Arrays = Mapping[str, np.ndarray]
Function = Callable[[Mapping[str, jax.Array]], object]

AUTO, EXPLICIT = jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit


@dataclasses.dataclass(frozen=True)
class Subject:
    """A function of named arrays, a plain function with the same results, and arrays to call them with.

    All arrays but those named in `shared` have a batch axis first, as have all results. Subjects with the same formula
    have the same plain function and inputs.
    """

    formula: str
    function: Function
    plain: Function
    inputs: Arrays
    shared: tuple[str, ...] = ()
    dtype: str = "float64"
    # Relative to the largest entry. Second derivatives of these small cases add up some hundred roundings of 1e-16.
    tolerance: float = 1e-12
    # Devices on which the function computes.
    devices: int = 1
    # Interpreted kernels compile for seconds. Their own tests have the gradients on meshes and under vmap.
    is_kernel: bool = False

    def tangents(self):
        rng = np.random.default_rng(2)
        return {name: rng.normal(size=x.shape) for name, x in self.inputs.items()}


def loss_of(function):
    return lambda x: sum(jnp.sum(jnp.sin(y)) for y in jax.tree.leaves(function(x)))


def jvp(function, subject):
    return lambda x, t: jax.jvp(function, (x,), (t,))


def linearize(function, subject):
    def transformed(x, t):
        outputs, push = jax.linearize(function, x)
        return outputs, push(t)

    return transformed


def grad(function, subject):
    return lambda x, t: jax.grad(loss_of(function))(x)


def grad_of_jvp(function, subject):
    return lambda x, t: jax.grad(lambda x: jax.jvp(loss_of(function), (x,), (t,))[1])(x)


def jvp_of_grad(function, subject):
    return lambda x, t: jax.jvp(jax.grad(loss_of(function)), (x,), (t,))


def vmap(function, subject):
    def transformed(x, t):
        two = jax.tree.map(lambda a, b: jnp.stack([a, a + b / 8]), x, t)
        return jax.vmap(jvp(function, subject), in_axes=(0, None))(two, t)

    return transformed


def vmap_with_unbatched_parameters(function, subject):
    def transformed(x, t):
        two = {name: a if name in subject.shared else jnp.stack([a, a + t[name] / 8]) for name, a in x.items()}
        mapped = jax.vmap(function, in_axes=({name: None if name in subject.shared else 0 for name in x},))
        tangents = {
            name: jnp.broadcast_to(t[name][None], a.shape) if a.ndim > t[name].ndim else t[name]
            for name, a in two.items()
        }
        if subject.is_kernel:
            return jax.jvp(mapped, (two,), (tangents,))
        return jax.jvp(mapped, (two,), (tangents,)), jax.grad(loss_of(mapped))(two)

    return transformed


def jit(function, subject):
    return lambda x, t: jax.jvp(jax.jit(loss_of(jax.jit(function))), (x,), (t,))


TRANSFORMS = {
    "jvp": jvp,
    "linearize": linearize,
    "grad": grad,
    "grad of jvp": grad_of_jvp,
    "jvp of grad": jvp_of_grad,
    "vmap": vmap,
    "vmap, unbatched parameters": vmap_with_unbatched_parameters,
    "jit": jit,
}


def first_derivatives(function, subject):
    if subject.is_kernel:
        return jvp(function, subject)
    return lambda x, t: (jvp(function, subject)(x, t), grad(function, subject)(x, t))


_expected = {}


def check(subject, transform, function=None, place=lambda name, x: x, run=lambda f, *args: jax.jit(f)(*args)):
    """The transformed function gives what the transformed plain function gives in float64.

    Args:
      subject: function, plain function and inputs.
      transform: of (function, subject), to a function of inputs and tangents.
      function: in place of the subject's own, for example mapped over a mesh.
      place: puts an array on devices, by its name.
      run: calls the transformed function, for example after an export.
    """
    key = (subject.formula, transform)
    if key not in _expected:
        with jax.enable_x64(True):
            x, t = (
                {name: jnp.asarray(jnp.asarray(value, subject.dtype), "float64") for name, value in arrays.items()}
                for arrays in (subject.inputs, subject.tangents())
            )
            _expected[key] = jax.jit(transform(subject.plain, subject))(x, t)
    expected = _expected[key]
    with jax.enable_x64(subject.dtype == "float64"):
        x, t = (
            {name: place(name, jnp.asarray(value, subject.dtype)) for name, value in arrays.items()}
            for arrays in (subject.inputs, subject.tangents())
        )
        computed = run(transform(function or subject.function, subject), x, t)
    assert jax.tree.structure(computed) == jax.tree.structure(expected)
    for got, wanted in zip(jax.tree.leaves(computed), jax.tree.leaves(expected), strict=True):
        got, wanted = (np.asarray(value, np.float64) for value in (got, wanted))
        assert got.shape == wanted.shape
        error, scale = np.max(np.abs(got - wanted), initial=0.0), np.max(np.abs(wanted), initial=0.0)
        assert error <= subject.tolerance * scale, f"relative error {error / scale:.1e}"


def check_on_mesh(subject, axis_type):
    """With the batch sharded over a mesh whose axes are automatic or explicit."""
    mesh = jax.make_mesh((2,), ("data",), (axis_type,), devices=jax.devices()[:2])

    def place(name, x):
        return jax.device_put(x, jax.NamedSharding(mesh, jax.P() if name in subject.shared else jax.P("data")))

    def run(function, *arguments):
        with jax.set_mesh(mesh):
            return jax.jit(function)(*arguments)

    check(subject, first_derivatives, place=place, run=run)


def check_in_shard_map(subject):
    """Inside a `jax.shard_map` over the batch, and the derivatives of the mapped function."""
    mesh = jax.make_mesh((2,), ("data",), (AUTO,), devices=jax.devices()[:2])
    specs = {name: jax.P() if name in subject.shared else jax.P("data") for name in subject.inputs}
    mapped = jax.shard_map(
        subject.function,
        mesh=mesh,
        in_specs=(specs,),
        out_specs=jax.P("data"),
        # JAX's interpreter of kernels does not know what varies over devices.
        check_vma=not subject.is_kernel,
    )
    check(subject, first_derivatives, function=mapped)


def check_exported(subject):
    """As a program that no longer knows the function."""
    mesh = jax.make_mesh((subject.devices,), ("seq",), (AUTO,), devices=jax.devices()[: subject.devices])
    check(
        subject,
        first_derivatives,
        place=lambda name, x: jax.device_put(x, jax.NamedSharding(mesh, jax.P())),
        run=lambda function, *arguments: jax.export.export(jax.jit(function))(*arguments).call(*arguments),
    )


ON_MESHES = {
    "automatic mesh": lambda subject: check_on_mesh(subject, AUTO),
    "explicit mesh": lambda subject: check_on_mesh(subject, EXPLICIT),
    "shard_map": check_in_shard_map,
}
CHECKS = {
    **{name: functools.partial(check, transform=transform) for name, transform in TRANSFORMS.items()},
    "export": check_exported,
}
