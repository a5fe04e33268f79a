"""Every transformation of JAX, of every operation of `kernels` and every implementation of the scan."""

import dataclasses
import functools
import re

import jax
import numpy as np
import pytest
from jax.experimental import pallas as pl

from sisma_jax.kernels import depthwise_conv2d, sequence_parallel_scan
from sisma_jax.kernels.selective_scan import api, mosaic_gpu, pallas_gpu, pallas_tpu
from tests.kernels.scan_cases import Case
from tests.kernels.test_depthwise_conv import xla_convolution
from tests.kernels.test_sequence_parallel import in_parts
from tests.kernels.test_ssd import Case as SsdCase
from tests.kernels.transforms import AUTO, CHECKS, EXPLICIT, ON_MESHES, Subject, check, first_derivatives
from tests.processes import ROOT

KERNELS = ("pallas_tpu", "mosaic_gpu", "pallas_gpu")
PARAMETERS = ("A", "D", "delta_bias")


def scan_subject(implementation):
    is_kernel = implementation in KERNELS
    # One state per channel and no gate: interpreted kernels compile for seconds.
    case = Case(2, 5, 4, 1, optional=PARAMETERS[1:]) if is_kernel else Case(2, 5, 4, 3, reverse=True)

    def scan(inputs, implementation=implementation):
        return case.scan(implementation, inputs)

    precision = dict(dtype="float32", tolerance=2e-5) if is_kernel else {}
    plain = functools.partial(scan, implementation="reference")
    return Subject(str(case), scan, plain, case.inputs(), PARAMETERS, is_kernel=is_kernel, **precision)


def parts_subject():
    case = Case(2, 6, 4, 3, reverse=True)
    whole = functools.partial(case.scan, "reference")
    return Subject(str(case), functools.partial(case.scan, in_parts(2)), whole, case.inputs(), PARAMETERS, devices=2)


def parts_on_mesh_subject(kind):
    """A sequence in two parts, on a mesh whose other axis, for the batch, is left to the partitioner of its kind."""
    case = Case(2, 6, 4, 3, optional=PARAMETERS[1:])
    axis_type = EXPLICIT if kind == "explicit mesh" else AUTO
    sizes, names = ((2,), ("seq",)) if kind != "shard_map" else ((2, 2), ("data", "seq"))
    mesh = jax.make_mesh(sizes, names, (axis_type,) * len(sizes), devices=jax.devices()[: 2 * len(sizes)])
    specs = {name: jax.P() if name in PARAMETERS else jax.P(None, "seq") for name in case.inputs()}

    def part(inputs):
        return sequence_parallel_scan(**inputs, delta_softplus=True)[0]

    function = jax.shard_map(part, mesh=mesh, in_specs=(specs,), out_specs=jax.P(None, "seq"), axis_names={"seq"})
    subject = Subject(str(case), function, lambda x: case.scan("reference", x)[0], case.inputs(), PARAMETERS)

    def place(name, x):
        return jax.device_put(x, jax.NamedSharding(mesh, specs[name]))

    def run(function, *arguments):
        with jax.set_mesh(mesh):
            return jax.jit(function)(*arguments)

    return functools.partial(check, subject, first_derivatives, place=place, run=run)


def convolution_subject():
    rng = np.random.default_rng(0)
    inputs = {"x": rng.normal(size=(2, 4, 3, 5)), "kernel": rng.normal(size=(3, 3, 5))}
    return Subject("convolution", lambda x: depthwise_conv2d(**x), lambda x: xla_convolution(**x), inputs, ("kernel",))


def ssd_subject():
    case = SsdCase(2, 35, 2, 2, 3, reverse=True)
    return Subject(str(case), case.run, case.tied_scan, case.inputs(), PARAMETERS)


SUBJECTS = {
    **{name: functools.partial(scan_subject, name) for name in api.IMPLEMENTATIONS},
    "sequence_parallel_scan": parts_subject,
    "ssd": ssd_subject,
    "depthwise_conv2d": convolution_subject,
}


@pytest.fixture(autouse=True)
def compile_soon():
    """These programs run for microseconds."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    """Kernels run in Pallas's interpreter, in small blocks."""
    block_sizes = pallas_tpu.block_sizes
    monkeypatch.setattr(pallas_tpu, "block_sizes", lambda *shape: dataclasses.replace(block_sizes(*shape), steps=16))
    monkeypatch.setattr(
        pallas_gpu, "block_sizes", lambda *shape: pallas_gpu.BlockSizes(4, pl.next_power_of_2(shape[3]), 2, 4)
    )
    monkeypatch.setattr(mosaic_gpu, "block_sizes", lambda d_state: mosaic_gpu.BlockSizes(4, d_state, 1))
    kernels = {name: functools.partial(api.IMPLEMENTATIONS[name], interpret=True) for name in KERNELS}
    monkeypatch.setattr(api, "IMPLEMENTATIONS", api.IMPLEMENTATIONS | kernels)


@pytest.mark.parametrize("transform", CHECKS)
@pytest.mark.parametrize("subject", SUBJECTS)
def test_the_transformed_function_is_the_transformed_formula(subject, transform):
    CHECKS[transform](SUBJECTS[subject]())


@pytest.mark.parametrize("mesh", ON_MESHES)
@pytest.mark.parametrize("subject", SUBJECTS)
def test_derivatives_on_a_mesh(subject, mesh):
    if subject == "sequence_parallel_scan":
        parts_on_mesh_subject(mesh)()
    else:
        ON_MESHES[mesh](SUBJECTS[subject]())


def test_the_documented_table_is_what_is_tested():
    table = re.search(r"^\| \| jvp .*?(?=\n\n)", (ROOT / "docs/architecture.md").read_text(), re.M | re.S)
    (_, *columns), _, *rows = (line.strip("| ").split(" | ") for line in ("| -" + table[0][1:]).splitlines())
    assert columns == [*CHECKS, *ON_MESHES]
    assert [name for name, *_ in rows] == [*SUBJECTS, "scan orders"]
    for name, *cells in rows:
        modes = "forward" if name in KERNELS else "both"
        by_mode = {"vmap, unbatched parameters", "export", *ON_MESHES}
        assert cells == [modes if column in by_mode else "yes" for column in columns]
