"""Compiles what a run would execute, for devices that need not be present, and reports what it takes."""

import logging
import math
import operator
import time

import jax
from jax.sharding import Mesh

from sisma_jax.config import Config
from sisma_jax.errors import InputError
from sisma_jax.parallel import sharding, topology
from sisma_jax.planning import collectives, flops, memory, programs
from sisma_jax.planning.report import Plan, Program
from sisma_jax.planning.search import LargestBatch, Trial, largest_batch

logger = logging.getLogger(__name__)

SETTINGS = (
    "data.image_size",
    "autoencoder.kind",
    "model.patch_size",
    "model.remat",
    "model.scan_implementation",
    "train.compute_dtype",
    "train.accumulate_steps",
    "sample.steps",
)
"""Those of the configuration on which the numbers depend most, beside the sizes that a plan shows anyway."""


def plan(
    config: Config,
    topology_name: str,
    *,
    search: bool = True,
    memory_gib: float | None = None,
    max_trials: int = 5,
) -> Plan:
    """Returns what training and sampling take on a topology.

    Args:
      topology_name: of a TPU, as libtpu names it ("v5e:4x4", "v5p:2x2x1"), or "cpu:8", virtual devices of a CPU.
      search: whether to search the largest batch that fits.
      memory_gib: of a device, if programs may use less than it has, or if it is not known.
      max_trials: how many batches the search compiles at most, the configured one included.

    Raises:
      InputError: `memory_gib` is not positive; there is no such topology or compiler; the mesh does not fit its devices
        or the batch the mesh; the configured scan does not run there.
    """
    if memory_gib is not None and not 0 < memory_gib < math.inf:
        raise InputError(f"`memory_gib` must be positive and finite, got {memory_gib}.")
    devices = topology.devices(topology_name)
    mesh = sharding.make_mesh(config.mesh, devices)
    sharding.require_fit(config, mesh, config.train.batch_size, config.train.accumulate_steps)
    config = programs.for_devices(config, mesh)
    limit = topology.memory_limit(devices[0])
    if memory_gib is not None:
        limit = min(int(memory_gib * 2**30), limit or math.inf)
    state = programs.abstract_state(config, mesh)
    train = train_program(config, mesh, config.train.batch_size, limit)
    sampler = sampler_program(config, mesh, sharding.round_up(config.sample.batch_size, mesh), limit)
    found = None
    if search and limit is not None:
        found = search_batch(config, mesh, limit, train, memory.state_bytes(state).total, max_trials)
    return Plan(
        topology=topology_name,
        device_kind=devices[0].device_kind,
        num_devices=len(devices),
        mesh=dict(mesh.shape),
        memory_limit=limit,
        peak_flops=topology.PEAK_FLOPS.get(devices[0].device_kind),
        num_parameters=sum(x.size for x in jax.tree.leaves(state.params)),
        state=memory.state_bytes(state),
        train=train,
        sampler=sampler,
        largest_batch=found,
        settings={name: operator.attrgetter(name)(config) for name in SETTINGS},
    )


def train_program(config: Config, mesh: Mesh, batch_size: int, limit: int | None) -> Program:
    """Returns the compiled update of the training state, for a batch of this size."""
    logger.info("Compiling the training step of batch %d for %d devices", batch_size, mesh.size)
    return _compile(programs.trace_update(config, mesh, batch_size), mesh, batch_size, limit)


def sampler_program(config: Config, mesh: Mesh, batch_size: int, limit: int | None) -> Program:
    """Returns the compiled sampler, for this number of masks."""
    logger.info("Compiling the sampler of batch %d for %d devices", batch_size, mesh.size)
    return _compile(programs.trace_sampler(config, mesh, batch_size), mesh, batch_size, limit)


def search_batch(config: Config, mesh: Mesh, limit: int, first: Program, fixed: int, max_trials: int) -> LargestBatch:
    """Returns the largest batch found to fit; `first` has been compiled."""

    def trial(program: Program) -> Trial:
        return Trial(program.batch_size, bool(program.fits), program.needed)

    return largest_batch(
        lambda batch_size: trial(train_program(config, mesh, batch_size, limit)),
        trial(first),
        unit=sharding.num_batch_shards(mesh) * config.train.accumulate_steps,
        fixed=fixed,
        limit=limit,
        max_trials=max_trials,
    )


def _compile(traced: jax.stages.Traced, mesh: Mesh, batch_size: int, limit: int | None) -> Program:
    start = time.perf_counter()
    compiled = memory.compile_or_shortage(traced, mesh.devices.flat[0])
    secs = round(time.perf_counter() - start, 1)
    operations = flops.count(traced.jaxpr)
    if isinstance(compiled, memory.Shortage):
        return Program(batch_size, False, None, compiled.needed, operations, None, secs)
    used = memory.read_memory(compiled)
    fits = None if limit is None else used.total <= limit
    (module,) = compiled.runtime_executable().hlo_modules()
    return Program(batch_size, fits, used, used.total, operations, collectives.traffic(module), secs)
