"""Programs whose collectives and loops are known, and the text of a TPU's program."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P
from jaxlib import xla_client

from sisma_jax.planning.collectives import Collective, traffic
from tests.tpu import tpu_devices

ROWS = 16  # of 4 columns, float32, on each device: 256 bytes
PART = ROWS * 4 * 4


def _module(compiled: jax.stages.Compiled) -> Any:
    (module,) = compiled.runtime_executable().hlo_modules()
    return module


def _compiled(function: Callable, mesh: jax.sharding.Mesh) -> Any:
    """The program in which each device of a mesh does this with its part."""
    spec = P(("data", "fsdp"))
    mapped = jax.shard_map(function, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    sharding = jax.sharding.NamedSharding(mesh, spec)
    x = jax.ShapeDtypeStruct((ROWS * mesh.size, 4), jnp.float32, sharding=sharding)
    return _module(jax.jit(mapped).lower(x).compile())


def _mesh(data: int, fsdp: int, devices: list[jax.Device] | None = None) -> jax.sharding.Mesh:
    types = (jax.sharding.AxisType.Auto,) * 2
    return jax.make_mesh((data, fsdp), ("data", "fsdp"), axis_types=types, devices=devices)


@pytest.mark.parametrize(
    ("function", "kind", "payload", "sent"),
    [
        (lambda x: lax.psum(x, "fsdp"), "all-reduce", PART, 2 * PART * 3 // 4),
        (lambda x: lax.all_gather(x, "fsdp"), "all-gather", 4 * PART, 4 * PART * 3 // 4),
        (lambda x: lax.psum_scatter(x, "fsdp", tiled=True), "reduce-scatter", PART, PART * 3 // 4),
        (lambda x: lax.all_to_all(x, "fsdp", 0, 1, tiled=True), "all-to-all", PART, PART * 3 // 4),
        (lambda x: lax.ppermute(x, "fsdp", [(i, (i + 1) % 4) for i in range(4)]), "collective-permute", PART, PART),
    ],
)
def test_each_kind_is_found_with_its_bytes(function, kind, payload, sent):
    found = traffic(_compiled(function, _mesh(2, 4)))
    assert found.collectives == (Collective(kind, 1, payload, sent),)
    assert found.num_unknown_loops == 0


def test_groups_are_those_of_the_axes():
    found = traffic(_compiled(lambda x: lax.psum(x, ("data", "fsdp")), _mesh(2, 4)))
    assert found.collectives == (Collective("all-reduce", 1, PART, 2 * PART * 7 // 8),)


@pytest.mark.parametrize(
    ("before", "after", "gathered", "group"),
    [
        (P("fsdp"), P(), 4 * PART, 4),  # as an axis of a mesh, of devices in another order in JAX 0.10
        (P(("data", "fsdp")), P(), 4 * PART, 8),
        (P(("data", "fsdp")), P("data"), 2 * PART, 4),  # as [2,4]<=[8] in JAX 0.12
        (P(("fsdp", "data")), P("fsdp"), PART, 2),  # as [4,2]<=[2,4]T(1,0)
    ],
)
def test_groups_are_found_however_the_partitioner_names_them(before, after, gathered, group):
    mesh = _mesh(2, 4)
    before, after = (jax.sharding.NamedSharding(mesh, spec) for spec in (before, after))
    x = jax.ShapeDtypeStruct((4 * ROWS, 4), jnp.float32, sharding=before)
    compiled = jax.jit(lambda x: 2 * x, out_shardings=after).lower(x).compile()
    found = Collective("all-gather", 1, gathered, gathered * (group - 1) // group)
    assert traffic(_module(compiled)).collectives == (found,)


def _permute(x):
    return lax.ppermute(jnp.sin(x), "fsdp", [(i, (i + 1) % 4) for i in range(4)])


def test_operations_of_one_channel_are_counted_apart():
    """All that `jax.shard_map` writes out have channel 1."""
    found = traffic(_compiled(lambda x: _permute(_permute(x)), _mesh(2, 4)))
    assert found.collectives == (Collective("collective-permute", 2, 2 * PART, 2 * PART),)


def test_of_a_conditional_the_branch_that_sends_most_counts():
    def either(x):
        return lax.cond(x[0, 0] > 0, lambda x: lax.psum(x, "fsdp"), lambda x: _permute(_permute(x)), x)

    found = traffic(_compiled(either, _mesh(2, 4)))
    assert found.collectives == (Collective("collective-permute", 2, 2 * PART, 2 * PART),)


def test_a_program_of_one_device_has_none():
    assert traffic(_module(jax.jit(jnp.sin).lower(jnp.ones(3)).compile())).collectives == ()


def _in_loops(x):
    """Three times (one all-reduce, and four times one all-gather); then a loop from 2 to 7 that permutes."""

    def inner(x, _):
        return lax.all_gather(x, "fsdp").sum(axis=0) * 0.1, None

    def outer(x, _):
        x = lax.psum(jnp.sin(x), "fsdp")
        return lax.scan(inner, x, length=4)[0], None

    x = lax.scan(outer, x, length=3)[0]
    shift = [(i, (i + 1) % 4) for i in range(4)]
    return lax.fori_loop(2, 7, lambda i, x: lax.ppermute(jnp.sin(x) * i, "fsdp", shift), x)


def test_an_operation_counts_once_per_iteration_of_all_loops_around_it():
    found = traffic(_compiled(_in_loops, _mesh(2, 4)))
    counts = {each.kind: (each.count, each.bytes) for each in found.collectives}
    assert counts == {
        "all-reduce": (3, 3 * PART),
        "all-gather": (12, 12 * 4 * PART),
        "collective-permute": (5, 5 * PART),
    }
    assert found.num_unknown_loops == 0


def test_a_tpus_loops_are_counted_too():
    """Its compiler does not name the number of iterations, and may spread an operation over fusions."""
    found = traffic(_compiled(_in_loops, _mesh(1, 4, tpu_devices("v5e:2x2"))))
    counts = {each.kind: each.count for each in found.collectives}
    assert counts["collective-permute"] == 5
    # It makes a sum over devices of a gather and a sum, or the reverse, where that is shorter.
    assert sum(counts.values()) == 3 + 12 + 5
    assert found.num_unknown_loops == 0


def test_a_loop_without_a_known_end_counts_once_and_is_told():
    def until_large(x):
        return lax.while_loop(lambda x: x[0, 0] < 3.0, lambda x: lax.psum(x, "fsdp") + 1.0, x)

    found = traffic(_compiled(until_large, _mesh(2, 4)))
    assert [(each.kind, each.count) for each in found.collectives] == [("all-reduce", 1)]
    assert found.num_unknown_loops == 1


# A program for v5e:2x2, shortened: a gather that starts, continues beside a computation, and is done, by its chain 0; a
# fusion that reduces and scatters; a permute; all of it 12 times.
TPU_PROGRAM = """\
HloModule jit_update, is_scheduled=true, num_partitions=4

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[]{:T(128)} parameter(0)
  %y = f32[]{:T(128)} parameter(1)
  ROOT %sum = f32[]{:T(128)} add(%x, %y)
}

%start (p.0: bf16[16,768]) -> bf16[64,768] {
  %p.0 = bf16[16,768]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %all-gather.1 = bf16[64,768]{1,0:T(8,128)(2,1)} all-gather(%p.0), channel_id=45, replica_groups=mesh['axis_0'=4,'axis_1'=1] {'axis_0'}, dimensions={0}, use_global_device_ids=true, frontend_attributes={chain_id="0"}
}

%async_collective_fusion.2 (p.1: bf16[16,768], p.2: f32[8]) -> (f32[8], bf16[64,768]) {
  %p.1 = bf16[16,768]{1,0:T(8,128)(2,1)} parameter(0)
  %p.2 = f32[8]{0:T(128)} parameter(1)
  %all-gather.2 = bf16[64,768]{1,0:T(8,128)(2,1)S(1)} all-gather(%p.1), channel_id=45, replica_groups=mesh['axis_0'=4,'axis_1'=1] {'axis_0'}, dimensions={0}, use_global_device_ids=true, frontend_attributes={chain_id="0"}
  %sine = f32[8]{0:T(128)} sine(%p.2)
  ROOT %t = (f32[8]{0:T(128)}, bf16[64,768]{1,0:T(8,128)(2,1)}) tuple(%sine, %all-gather.2)
}

%done (p.5: bf16[16,768]) -> bf16[64,768] {
  %p.5 = bf16[16,768]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %all-gather.3 = bf16[64,768]{1,0:T(8,128)(2,1)} all-gather(%p.5), channel_id=45, replica_groups=mesh['axis_0'=4,'axis_1'=1] {'axis_0'}, dimensions={0}, use_global_device_ids=true, frontend_attributes={chain_id="0"}
}

%all-reduce-scatter.1 (p.3: f32[256,768]) -> f32[256,192] {
  %p.3 = f32[256,768]{1,0:T(8,128)} parameter(0)
  %all-reduce.1 = f32[256,768]{1,0:T(8,128)} all-reduce(%p.3), channel_id=47, replica_groups={{0,1,2,3}}, use_global_device_ids=true, to_apply=%add
  %zero = s32[]{:T(128)} constant(0)
  ROOT %slice = f32[256,192]{1,0:T(8,128)} dynamic-slice(%all-reduce.1, %zero, %zero), dynamic_slice_sizes={256,192}
}

%body (b: (s32[], bf16[16,768], f32[8], f32[256,768], bf16[6,8,64])) -> (s32[], bf16[16,768], f32[8], f32[256,768], bf16[6,8,64]) {
  %b = (s32[]{:T(128)}, bf16[16,768]{1,0:T(8,128)(2,1)}, f32[8]{0:T(128)}, f32[256,768]{1,0:T(8,128)}, bf16[6,8,64]{2,1,0:T(8,128)(2,1)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%b), index=0
  %one = s32[]{:T(128)} constant(1)
  %i.2 = s32[]{:T(128)} add(%i, %one)
  %u = bf16[16,768]{1,0:T(8,128)(2,1)} get-tuple-element(%b), index=1
  %v = f32[8]{0:T(128)} get-tuple-element(%b), index=2
  %z = f32[256,768]{1,0:T(8,128)} get-tuple-element(%b), index=3
  %w = bf16[6,8,64]{2,1,0:T(8,128)(2,1)} get-tuple-element(%b), index=4
  %async-collective-start = bf16[64,768]{1,0:T(8,128)(2,1)} fusion(%u), kind=kCustom, calls=%start
  %fusion.2 = (f32[8]{0:T(128)}, bf16[64,768]{1,0:T(8,128)(2,1)}) fusion(%u, %v), kind=kOutput, calls=%async_collective_fusion.2
  %async-collective-done = bf16[64,768]{1,0:T(8,128)(2,1)} fusion(%u), kind=kCustom, calls=%done
  %fusion.3 = f32[256,192]{1,0:T(8,128)} fusion(%z), kind=kCustom, calls=%all-reduce-scatter.1
  %collective-permute-start.1 = (bf16[6,8,64]{2,1,0:T(8,128)(2,1)S(1)}, bf16[6,8,64]{2,1,0:T(8,128)(2,1)S(1)}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%w), channel_id=1, source_target_pairs={{0,1},{1,2},{2,3}}
  %collective-permute-done.1 = bf16[6,8,64]{2,1,0:T(8,128)(2,1)S(1)} collective-permute-done(%collective-permute-start.1)
  ROOT %next = (s32[]{:T(128)}, bf16[16,768]{1,0:T(8,128)(2,1)}, f32[8]{0:T(128)}, f32[256,768]{1,0:T(8,128)}, bf16[6,8,64]{2,1,0:T(8,128)(2,1)}) tuple(%i.2, %u, %v, %z, %collective-permute-done.1)
}

%condition (c: (s32[], bf16[16,768], f32[8], f32[256,768], bf16[6,8,64])) -> pred[] {
  %twelve = s32[]{:T(128)} constant(12), backend_config={"flag_configs":[]}
  %c = (s32[]{:T(128)}, bf16[16,768]{1,0:T(8,128)(2,1)}, f32[8]{0:T(128)}, f32[256,768]{1,0:T(8,128)}, bf16[6,8,64]{2,1,0:T(8,128)(2,1)}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%c), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i.1, %twelve), direction=LT
}

ENTRY %main (a: bf16[16,768], d: f32[8], e: f32[256,768], f: bf16[6,8,64]) -> bf16[16,768] {
  %a = bf16[16,768]{1,0:T(8,128)(2,1)} parameter(0)
  %d = f32[8]{0:T(128)} parameter(1)
  %e = f32[256,768]{1,0:T(8,128)} parameter(2)
  %f = bf16[6,8,64]{2,1,0:T(8,128)(2,1)} parameter(3)
  %zero.1 = s32[]{:T(128)} constant(0)
  %copy.1 = s32[]{:T(128)} copy(%zero.1)
  %initial = (s32[]{:T(128)}, bf16[16,768]{1,0:T(8,128)(2,1)}, f32[8]{0:T(128)}, f32[256,768]{1,0:T(8,128)}, bf16[6,8,64]{2,1,0:T(8,128)(2,1)}) tuple(%copy.1, %a, %d, %e, %f)
  %while.1 = (s32[]{:T(128)}, bf16[16,768]{1,0:T(8,128)(2,1)}, f32[8]{0:T(128)}, f32[256,768]{1,0:T(8,128)}, bf16[6,8,64]{2,1,0:T(8,128)(2,1)}) while(%initial), condition=%condition, body=%body, backend_config={"flag_configs":[]}
  ROOT %result = bf16[16,768]{1,0:T(8,128)(2,1)} get-tuple-element(%while.1), index=1
}
"""  # noqa: E501


@pytest.mark.parametrize("counter", ["s32", "u32"])  # of a scan; of a loop that the compiler makes of a product
def test_a_tpus_program_is_read(counter):
    gathered, reduced, permuted = 64 * 768 * 2, 256 * 768 * 4, 6 * 8 * 64 * 2
    found = traffic(xla_client.hlo.hlo_module_from_text(TPU_PROGRAM.replace("s32[]", f"{counter}[]")))
    assert found.num_unknown_loops == 0
    assert found.collectives == (
        Collective("all-gather", 12, 12 * gathered, 12 * gathered * 3 // 4),
        Collective("reduce-scatter", 12, 12 * reduced, 12 * reduced * 3 // 4),
        Collective("collective-permute", 12, 12 * permuted, 12 * permuted),
    )


def test_a_group_may_be_a_part_of_an_axis():
    """XLA writes so the two halves of an axis of 8 devices."""
    program = """\
HloModule gather, num_partitions=8

ENTRY %main (a: f32[16]) -> f32[64] {
  %a = f32[16]{0} parameter(0)
  ROOT %g = f32[64]{0} all-gather(%a), channel_id=1, replica_groups=mesh['x'=8] {'x':(2)4}, dimensions={0}, use_global_device_ids=true
}
"""  # noqa: E501
    found = traffic(xla_client.hlo.hlo_module_from_text(program))
    assert found.collectives == (Collective("all-gather", 1, 256, 256 * 3 // 4),)
