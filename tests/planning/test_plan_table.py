"""The table of plans, made of results that are there."""

import dataclasses
import json

from benchmarks import plan_table
from sisma_jax.flops import Flops
from sisma_jax.planning.collectives import Collective, Traffic
from sisma_jax.planning.memory import Memory, StateBytes
from sisma_jax.planning.report import Plan, Program
from sisma_jax.planning.search import LargestBatch, Trial

GIB = 2**30


def _plan() -> Plan:
    memory = Memory(arguments=GIB, outputs=0, temporaries=8 * GIB, code=GIB // 4)
    traffic = Traffic((Collective("all-gather", 3, 4 * GIB, 3 * GIB),), 0)
    train = Program(64, True, memory, memory.total, Flops(197 * 10**12, 10**12, 0), 0.0614, traffic, 60.0)
    refused = Program(16, False, None, 20 * GIB, Flops(10**12, 0, 0), None, None, 5.0)
    largest = LargestBatch(92, None, 96, (Trial(64, True, memory.total), Trial(92, True, 15 * GIB)))
    return Plan(
        topology="v5e:2x2",
        device_kind="TPU v5 lite",
        num_devices=4,
        mesh={"data": 1, "fsdp": 4, "seq": 1},
        memory_limit=16 * GIB,
        peak_flops=197e12,
        num_parameters=1,
        state=StateBytes(GIB // 4, GIB // 4, GIB // 2),
        train=train,
        sampler=refused,
        largest_batch=largest,
        settings={"train.compute_dtype": "bfloat16"},
    )


def test_results_become_rows_of_the_document(tmp_path):
    results, document = tmp_path / "plans.jsonl", tmp_path / "plan.md"
    record = {"preset": "B", "size": 256, "topology": "v5e:2x2", "plan": dataclasses.asdict(_plan())}
    results.write_text(json.dumps(record) + "\n")
    rows = plan_table.plans_table(plan_table.read(results))
    expected = "16.00 | 1.00 | 1.00 + 8.00 + 0.25 | does not fit | 198.0 | 3.00 | 250 + 61 | 92 | (96) |"
    assert rows[2] == f"| SISMA-B | 256 | v5e:2x2 | {expected}"
    assert rows[3].startswith("| SISMA-B | 256 | v5e:4x4 | not made |")
    assert len({row.count("|") for row in rows}) == 1
    document.write_text("before\n<!-- plans -->\nold\n<!-- end of plans -->\nafter\n")
    plan_table.write(document, {"plans": rows})
    assert document.read_text() == "\n".join(["before", "<!-- plans -->", *rows, "<!-- end of plans -->", "after", ""])


def test_experiments_are_those_of_the_configurations():
    config = plan_table.experiment("XL", 512, 16)
    assert (config.model.depth, config.model.d_model, config.model.patch_size) == (28, 1152, 2)
    assert (config.mesh.fsdp, config.train.compute_dtype, config.model.remat) == (16, "bfloat16", "dots")
    assert config.autoencoder.kind == "kl"


def test_the_states_table_has_a_row_for_each_part():
    rows = plan_table.state_table()
    assert len(rows) == 2 + 2 * 3
    assert "(3.98)" in rows[2]  # at fsdp 4
