"""Compiles the training step and the sampler of a run for devices that need not be present, and reports their cost."""

import logging
import math
import operator
import time

import jax
from jax.sharding import Mesh

from sisma_jax import flops
from sisma_jax.config import Config
from sisma_jax.errors import InputError
from sisma_jax.parallel import sharding, topology
from sisma_jax.planning import collectives, memory, programs, scans
from sisma_jax.planning.report import Plan, Program
from sisma_jax.planning.search import LargestBatch, Trial, largest_batch

logger = logging.getLogger(__name__)

SETTINGS = (
    "data.image_size",
    "autoencoder.kind",
    "model.patch_size",
    "model.mixer",
    "model.remat",
    "model.scan_implementation",
    "train.compute_dtype",
    "train.accumulate_steps",
    "sample.steps",
)
"""The configuration values that a plan lists: those that affect memory and cost most, besides sizes shown elsewhere."""


def plan(
    config: Config,
    topology_name: str,
    *,
    search: bool = True,
    memory_gib: float | None = None,
    max_trials: int = 5,
) -> Plan:
    """Returns the memory and cost of training and sampling on a topology.

    Compiling takes seconds for CPUs, and minutes per program for TPUs.

    Args:
      config: configuration of the run; its data and weights need not exist.
      topology_name: a TPU topology as libtpu names it, such as "v5e:4x4" or "v5p:2x2x1", or "cpu:8" for eight virtual
        devices of this machine's CPU.
      search: search for the largest batch size that fits into memory. This requires a known memory limit.
      memory_gib: memory per device that the programs may use, in GiB. None takes the limit of the compiler, which is
        known for TPUs only; a larger value than that limit has no effect.
      max_trials: largest number of batch sizes that the search compiles, including the configured one.

    Raises:
      InputError: `memory_gib` is not positive and finite, the topology or its compiler is not available, the mesh does
        not match the number of devices, the batch size does not match the mesh, or the configured scan implementation
        does not run on these devices.
    """
    if memory_gib is not None and not 0 < memory_gib < math.inf:
        raise InputError(f"`memory_gib` must be positive and finite, got {memory_gib}.")
    devices = topology.devices(topology_name)
    mesh = sharding.make_mesh(config.mesh, devices)
    sharding.require_fit(config, mesh, config.train.batch_size, config.train.accumulate_steps)
    config = programs.for_devices(config, mesh)
    limit = topology.memory_limit(devices[0])
    if memory_gib is not None:
        usable = int(memory_gib * 2**30)
        limit = usable if limit is None else min(usable, limit)
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
    """Returns memory and cost of the training step, which is compiled.

    Args:
      config: configuration of the run, after `programs.for_devices`.
      mesh: of the devices.
      batch_size: total over all devices; a multiple of the number of batch shards times `train.accumulate_steps`.
      limit: bytes of memory per device; None if not known.
    """
    logger.info("Compiling the training step with batch size %d for %d devices", batch_size, mesh.size)
    return _compile(programs.trace_update(config, mesh, batch_size), mesh, batch_size, limit)


def sampler_program(config: Config, mesh: Mesh, batch_size: int, limit: int | None) -> Program:
    """Returns memory and cost of one call of the sampler, which is compiled.

    Args:
      config: configuration of the run, after `programs.for_devices`.
      mesh: of the devices.
      batch_size: number of masks, as a total over all devices; a multiple of the number of batch shards.
      limit: bytes of memory per device; None if not known.
    """
    logger.info("Compiling the sampler with batch size %d for %d devices", batch_size, mesh.size)
    return _compile(programs.trace_sampler(config, mesh, batch_size), mesh, batch_size, limit)


def search_batch(config: Config, mesh: Mesh, limit: int, first: Program, fixed: int, max_trials: int) -> LargestBatch:
    """Returns the result of a search for the largest batch size of the training step that fits into memory.

    Args:
      config: configuration of the run, after `programs.for_devices`.
      mesh: of the devices.
      limit: bytes of memory per device.
      first: training step that has been compiled, from `train_program`.
      fixed: approximate bytes per device that do not depend on the batch size: those of the training state.
      max_trials: largest number of compiled batch sizes, including `first`.
    """

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
    device = mesh.devices.flat[0]
    start = time.perf_counter()
    compiled = memory.compile_or_shortage(traced, device)
    secs = round(time.perf_counter() - start, 1)
    operations = flops.count(traced.jaxpr)
    scan_secs = scans.least_secs(scans.kernel_steps(traced.jaxpr), device)
    if isinstance(compiled, memory.Shortage):
        return Program(batch_size, False, None, compiled.needed, operations, scan_secs, None, secs)
    used = memory.read_memory(compiled)
    fits = None if limit is None else used.total <= limit
    executable = compiled.runtime_executable()
    assert executable is not None, "XLA's compilers return an executable"
    (module,) = executable.hlo_modules()
    return Program(batch_size, fits, used, used.total, operations, scan_secs, collectives.traffic(module), secs)
