"""The counting of instructions in the TPU compiler's listings."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.selective_scan_tpu import count, loops
from sisma_jax.kernels.selective_scan.pallas_tpu_layout import BlockSizes
from tests.tpu import tpu_devices

ROOT = Path(__file__).resolve().parents[2]

# A bundle before the grid, one of the grid, a loop of two bundles, a bundle of a loop around one with a spill, a bundle
# after the loops, and one after the grid.
LISTING = """
     0   :  { %s1 = inlined_call_operand.hbm }
   0x1 LB: > { %s2 = sphi 0 }
   0x2 LB: >> { %v1_v0 = vld [vmem:%s2]  ;;  %2 = vpow2.f32 %v1_v0 }
   0x3   : >> { %v3_v7 = vpop.eup %2 }
   0x4 LB: >> { %s4 = sadd.s32 1, %s2 }
   0x5 LB: >>> { %5 = vpow2.f32 %v3_v7  ;;  %6 = vst [vmem:%s2] %v3_v7 /* 8-byte Spill */ }
   0x6   : > { %s7 = sadd.s32 1, %s2 }
   0x7   :  { %8 = halt }
"""
UTILIZATION = "== CAPACITY:\n" + "0 0 0 0 0 0 0 0 0 0\n" * 5 + "0 0 0 0 1 0 0 1 1 0\n" + "0 0 0 0 0 0 0 0 0 0\n" * 2


@pytest.fixture
def dump(tmp_path):
    (tmp_path / "1-selective_scan_forward.1-72-final_bundles.txt").write_text(LISTING)
    (tmp_path / "1-selective_scan_forward.1-70-final_hlo-static-per-bundle-utilization.txt").write_text(UTILIZATION)
    return tmp_path


def test_bundles_count_as_often_as_their_loops_run(dump):
    kernel = count(dump, "forward", [(5, []), (3, [(7, [])])], scale=2.0)
    assert kernel.bundles == 2 * (1 + 5 * 2 + 3 * (1 + 7) + 1)
    assert kernel.exponentials == 2 * (5 + 3 * 7)
    assert kernel.spills == 2 * 3 * 7
    assert kernel.registers == 2


@pytest.mark.parametrize("expected", [[(5, [])], [(5, []), (3, [])], [(5, []), (3, [(7, [])]), (5, [])]])
def test_other_loops_than_expected_are_refused(dump, expected):
    with pytest.raises(RuntimeError, match="loops"):
        count(dump, "forward", expected, scale=1.0)


def test_a_single_strip_has_no_loop():
    assert loops("forward", BlockSizes(tiles=2, strips=1, steps=128), chunks=8) == [(4, []), (8, []), (4, [])]
    strips = loops("backward", BlockSizes(tiles=2, strips=3, steps=128), chunks=8)
    assert strips == [(1, []), (4, []), (3, [(8, []), (8, [])]), (4, [])]


@pytest.mark.slow
def test_the_table_for_plans_is_that_of_the_present_kernels(tmp_path):
    """In a process of its own, because libtpu reads where to write its listings when it is loaded."""
    tpu_devices("v5e:2x2")
    script, table = ROOT / "benchmarks/selective_scan_tpu.py", tmp_path / "table.json"
    arguments = ["--chips", "v5e", "--d-inner", "768", "--table", str(table)]
    subprocess.run([sys.executable, str(script), *arguments], check=True, capture_output=True)
    made = json.loads(table.read_text())
    committed = json.loads((ROOT / "sisma_jax/planning/scan_bundles.json").read_text())
    if made["compiler"] != committed["compiler"]:
        pytest.skip(f"the table is that of another compiler: {committed['compiler']}")
    assert made["kernels"] == [x for x in committed["kernels"] if x["device_kind"] == "TPU v5 lite"][:1]
