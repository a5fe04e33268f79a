"""SSD against its recurrence in float64, a step at a time, and against the selective scan with tied decays."""

import dataclasses
import functools
import inspect
import math
import re

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sisma_jax.flops import count
from sisma_jax.kernels import selective_scan, ssd
from sisma_jax.kernels.selective_scan import CHECKPOINT_NAME
from sisma_jax.kernels.ssd import CHUNK_STEPS
from tests.kernels.scan_cases import FLOAT32, assert_close

ARGUMENTS = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state")
PARAMETERS = ("A", "D", "delta_bias")
# Decays are exponentials of differences of sums, whose terms add up to about 100 in a chunk of these cases.
ROUNDED_DECAYS = dict(value_tolerance=1e-5, gradient_tolerance=2e-5)
# The factors of products are rounded to bfloat16, and entries are rounded on their way out: each to 2^-9 of itself.
# Every gradient is a sum of two to four terms, which are rounded separately.
BFLOAT16 = dict(value_tolerance=2**-7, gradient_tolerance=2**-6)


@dataclasses.dataclass(frozen=True)
class Case:
    """A problem's sizes and options; hashable, so that expected results are computed once."""

    batch: int
    length: int
    heads: int
    channels: int
    d_state: int
    optional: tuple[str, ...] = ARGUMENTS[5:]
    delta_softplus: bool = True
    reverse: bool = False
    dtype: str = "float32"

    @property
    def d_inner(self) -> int:
        return self.heads * self.channels

    def inputs(self) -> dict[str, np.ndarray]:
        """Arguments in float64, whose values are exact in `dtype`."""
        rng = np.random.default_rng(0)
        batch, length, heads, d_inner, d_state = self.batch, self.length, self.heads, self.d_inner, self.d_state
        delta = rng.normal(size=(batch, length, heads)) - 1
        arrays = {
            "u": rng.normal(size=(batch, length, d_inner)),
            "delta": delta if self.delta_softplus else np.exp(delta),
            "A": -np.exp(rng.normal(size=heads)),
            "B": rng.normal(size=(batch, length, d_state)),
            "C": rng.normal(size=(batch, length, d_state)),
            "D": rng.normal(size=d_inner),
            "z": rng.normal(size=(batch, length, d_inner)),
            "delta_bias": rng.normal(size=heads) if self.delta_softplus else np.abs(rng.normal(size=heads)),
            "initial_state": rng.normal(size=(batch, d_inner, d_state)),
        }
        kept = {name: x for name, x in arrays.items() if name in ARGUMENTS[:5] or name in self.optional}
        return {name: np.asarray(jnp.asarray(x, self.dtype_of(name)), np.float64) for name, x in kept.items()}

    def cotangents(self) -> tuple[np.ndarray, np.ndarray]:
        rng = np.random.default_rng(1)
        dy = rng.normal(size=(self.batch, self.length, self.d_inner))
        d_final_state = rng.normal(size=(self.batch, self.d_inner, self.d_state))
        return np.asarray(jnp.asarray(dy, self.dtype), np.float64), np.asarray(d_final_state, np.float32)

    def dtype_of(self, name: str) -> str:
        """A model computes sequences in `dtype` and keeps its parameters and the state in float32."""
        return self.dtype if name in ("u", "delta", "B", "C", "z") else "float32"

    @property
    def options(self) -> dict[str, bool]:
        return dict(delta_softplus=self.delta_softplus, reverse=self.reverse)

    def run(self, inputs):
        return ssd(**inputs, **self.options, return_final_state=True)

    def tied_scan(self, inputs, implementation="reference"):
        """The selective scan with the Δ, A and bias of a head for all of its channels and states."""
        tied = {
            name: jnp.repeat(inputs[name], self.channels, axis=-1) for name in ("delta", "delta_bias") if name in inputs
        }
        A = jnp.repeat(inputs["A"], self.channels)[:, None]
        tied["A"] = jnp.broadcast_to(A, (self.d_inner, self.d_state))
        arguments = {**inputs, **tied}
        return selective_scan(**arguments, **self.options, return_final_state=True, implementation=implementation)

    def steps(self, inputs):
        """The formula of the docstring, a step at a time, in the dtype of the inputs."""
        x = inputs
        heads = (self.batch, self.heads, self.channels)
        delta = x["delta"] + (x["delta_bias"] if "delta_bias" in x else jnp.zeros_like(x["A"]))[None, None]
        delta = jax.nn.softplus(delta) if self.delta_softplus else delta
        h = jnp.zeros((*heads, self.d_state), x["u"].dtype)
        h = x["initial_state"].reshape(h.shape) if "initial_state" in x else h
        y = [h[..., 0]] * self.length
        for t in range(self.length)[:: -1 if self.reverse else 1]:
            decay = jnp.exp(delta[:, t] * x["A"][None])[:, :, None, None]
            drive = delta[:, t][:, :, None] * x["u"][:, t].reshape(heads)
            h = decay * h + drive[..., None] * x["B"][:, t][:, None, None]
            y[t] = (h * x["C"][:, t][:, None, None]).sum(-1)
        y = jnp.stack(y, axis=1).reshape(x["u"].shape)
        y = y + (x["D"][None, None] * x["u"] if "D" in x else 0)
        y = y * jax.nn.silu(x["z"]) if "z" in x else y
        return y, h.reshape(self.batch, self.d_inner, self.d_state)


def results(run, inputs, cotangents):
    """{"y", "final_state", "d <argument>" for every argument}; may be compiled."""
    (y, final_state), vjp = jax.vjp(run, inputs)
    dy, d_final_state = cotangents
    (gradients,) = vjp((dy.astype(y.dtype), d_final_state.astype(final_state.dtype)))
    return {"y": y, "final_state": final_state} | {f"d {name}": gradient for name, gradient in gradients.items()}


def computed(case: Case, run=None):
    inputs = {name: jnp.asarray(x, case.dtype_of(name)) for name, x in case.inputs().items()}
    cotangents = tuple(jnp.asarray(x, "float32") for x in case.cotangents())
    return jax.jit(functools.partial(results, run or case.run))(inputs, cotangents)


def in_float64(case: Case, run):
    with jax.enable_x64(True):
        inputs, cotangents = jax.tree.map(lambda x: jnp.asarray(x, "float64"), (case.inputs(), case.cotangents()))
        return jax.tree.map(np.asarray, jax.jit(functools.partial(results, run))(inputs, cotangents))


@functools.cache
def expected(case: Case):
    """The selective scan with tied decays, in float64."""
    return in_float64(case, case.tied_scan)


# Rounding of float64 sums with some hundred terms.
FLOAT64 = dict(value_tolerance=1e-12, gradient_tolerance=1e-12)

CASES = {
    "bare": Case(2, 11, 3, 4, 5, optional=(), delta_softplus=False),
    "bare, reversed": Case(2, 11, 3, 4, 5, optional=(), delta_softplus=False, reverse=True),
    "ragged": Case(2, 2 * CHUNK_STEPS + 7, 3, 4, 5),
    "ragged, reversed": Case(2, 2 * CHUNK_STEPS + 7, 3, 4, 5, reverse=True),
    "whole chunks, reversed": Case(1, 2 * CHUNK_STEPS, 2, 8, 3, reverse=True),
    "one step": Case(2, 1, 2, 3, 3),
    "one example, one channel, one state": Case(1, CHUNK_STEPS + 1, 1, 1, 1),
    "one head": Case(2, 9, 1, 6, 3, optional=("D",)),
    "heads of one channel": Case(1, 9, 6, 1, 3, optional=("z",), delta_softplus=False),
    "delta_bias only": Case(1, 9, 2, 3, 3, optional=("delta_bias",), delta_softplus=False),
    "initial_state only": Case(1, 9, 2, 3, 3, optional=("initial_state",), reverse=True),
}


@pytest.mark.parametrize("name", ["bare", "bare, reversed", "one step", "one head", "initial_state only"])
def test_float64_is_the_recurrence_step_by_step(name):
    case = CASES[name]
    assert_close(in_float64(case, case.run), in_float64(case, case.steps), **FLOAT64)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_float64_is_the_selective_scan_with_tied_decays(case):
    exact = in_float64(case, case.run)
    assert {x.dtype.name for x in exact.values()} == {"float64"}
    assert_close(exact, expected(case), **FLOAT64)


@hypothesis.settings(max_examples=12)
@hypothesis.given(
    sizes=st.tuples(*(st.integers(1, limit) for limit in (3, 2 * CHUNK_STEPS + 3, 4, 4, 5))),
    optional=st.lists(st.sampled_from(ARGUMENTS[5:]), unique=True).map(tuple),
    delta_softplus=st.booleans(),
    reverse=st.booleans(),
)
def test_any_sizes_are_the_selective_scan_with_tied_decays(sizes, optional, delta_softplus, reverse):
    case = Case(*sizes, optional=optional, delta_softplus=delta_softplus, reverse=reverse)
    assert_close(in_float64(case, case.run), in_float64(case, case.tied_scan), **FLOAT64)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_values_and_gradients_in_float32(case):
    assert_close(computed(case), expected(case), **ROUNDED_DECAYS)


@pytest.mark.parametrize("implementation", ["xla", "associative"])
def test_float32_is_that_of_the_scans_implementations(implementation):
    case = CASES["ragged, reversed"]
    scan = functools.partial(case.tied_scan, implementation=implementation)
    wanted = {name: np.asarray(x, np.float64) for name, x in computed(case, scan).items()}
    assert_close(computed(case), wanted, **ROUNDED_DECAYS)


@pytest.mark.parametrize(("length", "reverse"), [(37, False), (37, True), (5, True)])
def test_values_and_gradients_in_bfloat16(length, reverse):
    case = Case(2, length, 3, 8, 5, reverse=reverse, dtype="bfloat16")
    rough = computed(case)
    assert rough["y"].dtype == jnp.bfloat16
    assert rough["final_state"].dtype == jnp.float32
    assert {name: rough[f"d {name}"].dtype.name for name in ARGUMENTS} == {n: case.dtype_of(n) for n in ARGUMENTS}
    assert_close(rough, expected(case), **BFLOAT16)


def test_without_jit():
    case = CASES["one head"]
    inputs, cotangents = jax.tree.map(lambda x: jnp.asarray(x, "float32"), (case.inputs(), case.cotangents()))
    assert_close(results(case.run, inputs, cotangents), expected(case), **FLOAT32)


def test_twice_gives_the_same_bits():
    case = Case(2, 100, 4, 64, 16)
    function = jax.jit(functools.partial(results, case.run))
    inputs, cotangents = jax.tree.map(lambda x: jnp.asarray(x, "float32"), (case.inputs(), case.cotangents()))
    for first, second in zip(*(jax.tree.leaves(function(inputs, cotangents)) for _ in range(2)), strict=True):
        np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("reverse", [False, True])
def test_an_empty_sequence_returns_the_initial_state(reverse):
    case = Case(2, 0, 2, 3, 4, reverse=reverse)
    of_nothing = computed(case)
    assert of_nothing["y"].shape == (2, 0, 6)
    np.testing.assert_array_equal(of_nothing["final_state"], case.inputs()["initial_state"])
    np.testing.assert_array_equal(of_nothing["d initial_state"], case.cotangents()[1])
    np.testing.assert_array_equal(of_nothing["d A"], 0.0)


@pytest.mark.parametrize("decay", [1e4, 1e-7], ids=["forgets at once", "hardly forgets"])
def test_long_sequences_of_extreme_decays_stay_finite_and_right(decay):
    case = Case(1, 8192, 2, 4, 2, optional=(), delta_softplus=False)
    inputs = case.inputs() | {"A": np.full(2, -decay), "delta": case.inputs()["delta"] / 8}
    inputs = {name: np.asarray(x, np.float32) for name, x in inputs.items()}
    cotangents = tuple(np.asarray(x, np.float32) for x in case.cotangents())
    got = jax.jit(functools.partial(results, case.run))(inputs, cotangents)
    with jax.enable_x64(True):
        inputs, cotangents = jax.tree.map(lambda x: jnp.asarray(x, "float64"), (inputs, cotangents))
        wanted = jax.jit(functools.partial(results, case.tied_scan))(inputs, cotangents)
    # The gradient of A is zero where every state forgets at once, so its error has no scale but that of its terms.
    for name in wanted if decay < 1 else wanted.keys() - {"d A"}:
        assert np.all(np.isfinite(got[name])), name
        scale = np.max(np.abs(wanted[name])) + np.finfo(np.float32).tiny
        # A state that hardly forgets is a random walk of 8,192 terms, each rounded: 1e-7 · sqrt(8192) · a few.
        assert np.max(np.abs(got[name] - wanted[name])) <= 1e-4 * scale, name


def test_a_long_step_among_short_ones_is_forgotten_without_overflow():
    case = Case(1, CHUNK_STEPS, 1, 1, 1, optional=(), delta_softplus=False)
    inputs = {name: jnp.asarray(x, "float32") for name, x in case.inputs().items()}
    inputs["delta"] = inputs["delta"].at[0, 5].set(1e4)
    y, final_state = jax.jit(case.run)(inputs)
    gradients = jax.jit(jax.grad(lambda x: case.run(x)[0].sum()))(inputs)
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves((y, final_state, gradients)))


def test_the_gradient_keeps_states_between_chunks_and_no_decays():
    """No array of the program has an entry for each example, pair of steps in a chunk and head, over the sequence."""
    case = Case(2, 16 * CHUNK_STEPS, 4, 8, 4)
    inputs, cotangents = jax.tree.map(lambda x: jnp.asarray(x, "float32"), (case.inputs(), case.cotangents()))
    program = jax.jit(functools.partial(results, case.run)).lower(inputs, cotangents).compile().as_text()
    largest = max(math.prod(map(int, shape.split(","))) for shape in re.findall(r"\bf\d+\[([\d,]+)\]", program))
    pairs = case.batch * case.length * CHUNK_STEPS * case.heads
    assert largest == case.batch * case.length * case.d_inner < pairs


@pytest.mark.parametrize(("policy", "repeats"), [("named", False), ("nothing", True)])
def test_a_policy_that_keeps_the_name_repeats_no_products(policy, repeats):
    case = CASES["ragged"]
    inputs = {name: jnp.asarray(x, "float32") for name, x in case.inputs().items()}
    policies = {
        "named": jax.checkpoint_policies.save_only_these_names(CHECKPOINT_NAME),
        "nothing": jax.checkpoint_policies.nothing_saveable,
    }

    def products(run):
        gradient = jax.grad(lambda x: sum(jnp.sum(jnp.sin(y)) for y in run(x)))
        return count(jax.jit(gradient).trace(inputs).jaxpr).matmul

    assert (products(jax.checkpoint(case.run, policy=policies[policy])) > products(case.run)) == repeats


@pytest.mark.parametrize("axis_type", [jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit])
@pytest.mark.parametrize("mapped", [False, True], ids=["jit", "shard_map"])
def test_a_sharded_batch_stays_where_it_is(mapped, axis_type):
    case = Case(8, 40, 4, 4, 4)
    mesh = jax.make_mesh((4, 2), ("data", "fsdp"), axis_types=(axis_type, axis_type))
    by_batch = jax.P(("data", "fsdp"))
    specs = {name: jax.P() if name in PARAMETERS else by_batch for name in ARGUMENTS}
    check_sharded(case, mesh, specs, (by_batch, by_batch), mapped, r"(all-gather|all-to-all|collective-permute)\(")


@pytest.mark.parametrize("mapped", [False, True], ids=["jit", "shard_map"])
def test_sharded_heads_stay_where_they_are(mapped):
    case = Case(2, 40, 4, 4, 4)
    mesh = jax.make_mesh((2, 4), ("data", "heads"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    by_channel, parameter = jax.P("data", None, "heads"), jax.P("heads")
    specs = dict.fromkeys(("u", "delta", "z"), by_channel) | dict.fromkeys(PARAMETERS, parameter)
    specs |= dict.fromkeys(("B", "C"), jax.P("data")) | {"initial_state": jax.P("data", "heads")}
    # Every head has B and C, whose gradients are summed over the devices.
    check_sharded(
        case, mesh, specs, (by_channel, specs["initial_state"]), mapped, r"(all-gather|all-to-all|collective-permute)\("
    )


def check_sharded(case, mesh, specs, out_specs, mapped, forbidden):
    run = case.run
    if mapped:
        run = jax.shard_map(run, mesh=mesh, in_specs=(specs,), out_specs=out_specs)

    def put(x, spec):
        return jax.device_put(jnp.asarray(x, "float32"), jax.NamedSharding(mesh, spec))

    inputs = {name: put(x, specs[name]) for name, x in case.inputs().items()}
    cotangents = tuple(put(x, spec) for x, spec in zip(case.cotangents(), out_specs, strict=True))
    with jax.set_mesh(mesh):
        compiled = jax.jit(functools.partial(results, run)).lower(inputs, cotangents).compile()
    assert not re.search(forbidden, compiled.as_text())
    assert_close(compiled(inputs, cotangents), expected(case), **ROUNDED_DECAYS)


GOOD = Case(2, 5, 2, 3, 4)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("u", (5, 6), r"u: got shape \(5, 6\), want \(batch, length, d_inner\)"),
        ("delta", (2, 5, 6), r"delta: got shape \(2, 5, 6\), want \(2, 5, 2\): \(batch, length, heads\)"),
        ("A", (4,), r"A: got shape \(4,\), want \(heads,\) where heads divides d_inner = 6"),
        ("A", (0,), r"A: got shape \(0,\), want \(heads,\)"),
        ("A", (6, 4), r"A: got shape \(6, 4\), want \(heads,\)"),
        ("B", (5, 4), r"B: got shape \(5, 4\), want \(batch, length, d_state\)"),
        ("B", (2, 4, 4), r"B: got shape \(2, 4, 4\), want \(2, 5, 4\)"),
        ("C", (2, 5, 6), r"C: got shape \(2, 5, 6\), want \(2, 5, 4\)"),
        ("D", (2,), r"D: got shape \(2,\), want \(6,\)"),
        ("z", (2, 5), r"z: got shape \(2, 5\), want \(2, 5, 6\)"),
        ("delta_bias", (6,), r"delta_bias: got shape \(6,\), want \(2,\)"),
        ("initial_state", (2, 4, 6), r"initial_state: got shape \(2, 4, 6\), want \(2, 6, 4\)"),
    ],
)
def test_a_wrong_shape_is_named(name, shape, message):
    inputs = {key: jnp.asarray(x, "float32") for key, x in GOOD.inputs().items()} | {name: jnp.zeros(shape)}
    with pytest.raises(ValueError, match=message):
        _as_users_call_it(**inputs)


def test_integers_are_refused_by_name():
    inputs = {key: jnp.asarray(x, "float32") for key, x in GOOD.inputs().items()} | {"u": jnp.ones((2, 5, 6), int)}
    with pytest.raises(ValueError, match="u: got dtype int32, want a real floating-point type"):
        _as_users_call_it(**inputs)


def _as_users_call_it(**arguments):
    """Without the annotation checks of test time, which would speak first."""
    return inspect.unwrap(ssd)(**arguments)
