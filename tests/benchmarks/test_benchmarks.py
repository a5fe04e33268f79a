"""The benchmarks' arithmetic and files. Nothing here depends on how fast anything is."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from benchmarks import (
    ablation,
    data,
    denoiser,
    depthwise_conv,
    forward_mode,
    loop_overhead,
    measure,
    peers,
    scan_orders,
    selective_scan,
    ssd,
    thin_parts,
)
from sisma_jax.config import Config, DataConfig, ModelConfig, preset
from sisma_jax.data.classes import CELEBAMASK_HQ
from sisma_jax.data.drawing import draw_face
from sisma_jax.kernels.selective_scan import api
from sisma_jax.models.factory import init_params
from sisma_jax.models.mask_encoder import MaskEncoder
from sisma_jax.models.scan_orders import ORDERS

ROOT = Path(__file__).resolve().parents[2]


class Clock:
    """Time that passes only while somebody works."""

    now = 0.0

    def __call__(self) -> float:
        return self.now

    def work(self, secs: float):
        self.now += secs


def test_candidates_take_turns():
    clock, calls = Clock(), []

    def candidate(name, secs):
        def run():
            calls.append(name)
            clock.work(secs)

        return run

    samples = measure.round_robin({"a": candidate("a", 1.0), "b": candidate("b", 2.0)}, repeats=3, clock=clock)
    assert calls == ["a", "b", "a", "b", "a", "b"]
    assert samples == {"a": [1.0] * 3, "b": [2.0] * 3}


def test_who_has_used_up_the_budget_sits_out():
    clock = Clock()
    runs = {"quick": lambda: clock.work(1.0), "slow": lambda: clock.work(50.0)}
    samples = measure.round_robin(runs, repeats=4, budget_secs=60.0, clock=clock)
    assert {name: len(secs) for name, secs in samples.items()} == {"quick": 4, "slow": 2}


def test_a_wrong_result_and_one_too_large_are_not_timed():
    candidates = [
        measure.Candidate("right", lambda: jnp.ones(3), group="ones"),
        measure.Candidate("rounded", lambda: jnp.ones(3) + 1e-6, group="ones"),
        measure.Candidate("wrong", lambda: jnp.ones(3) + 1e-3, group="ones"),
        measure.Candidate("of another shape", lambda: jnp.ones(1), group="ones"),
        measure.Candidate("not a number", lambda: jnp.ones(3) * jnp.nan, group="ones"),
        measure.Candidate("another thing", lambda: jnp.zeros(3), group="zeros"),
        measure.Candidate("too large", lambda: pytest.fail("it ran"), group="ones", needed_bytes=2**60),
    ]
    results = measure.measure(candidates, repeats=2, budget_secs=60.0, tolerance=1e-5)
    skipped = {result["name"]: result["skipped"] for result in results if result["skipped"]}
    assert skipped == {
        "wrong": "wrong: relative error 1.0e-03",
        "of another shape": "wrong: relative error inf",
        "not a number": "wrong: relative error nan",
        "too large": "needs 1073741824.0 GiB",
    }
    assert [len(result["samples_secs"]) for result in results] == [2, 2, 0, 0, 0, 2, 0]


def test_a_first_run_over_the_budget_is_the_only_sample():
    calls = []
    candidate = measure.Candidate("slow", lambda: calls.append("slow"))
    (result,) = measure.measure([candidate], repeats=3, budget_secs=0.0, tolerance=0.0)
    assert (calls, len(result["samples_secs"])) == (["slow"], 1)


def test_one_array_that_is_wrong_is_noticed_among_others():
    good = {"a": np.ones(2), "b": np.ones(2), "c": np.zeros(2)}
    assert measure.relative_error(good, good) == 0.0
    assert np.isnan(measure.relative_error(good | {"b": np.array([1.0, np.nan])}, good))
    assert measure.relative_error(good | {"b": np.array([1.0, 1.5])}, good) == 0.5
    assert measure.relative_error(good | {"c": np.ones(2)}, good) > 1e30


def test_the_compiler_tells_the_temporaries():
    # A sort needs all of its input in memory, and this one's is neither an argument nor a result.
    x = jnp.arange(1024.0)
    candidate = measure.compiled_candidate("sort", lambda x: jnp.sort(jnp.sort(x)[::-1] * x), x)
    assert candidate.temporary_bytes >= x.nbytes
    assert candidate.needed_bytes == candidate.temporary_bytes + 2 * x.nbytes
    np.testing.assert_array_equal(candidate.run(), jnp.sort(jnp.sort(x)[::-1] * x))


def speeds(copy_secs: float, exp_secs: float) -> list[dict]:
    return [
        {"name": "floor: copy", "median_secs": copy_secs},
        {"name": "floor: exp", "median_secs": exp_secs},
    ]


def test_the_floor_is_the_larger_of_bytes_and_exponentials():
    # 512 MiB moved in 0.5 s, 2^25 exponentials in 0.25 s.
    results = speeds(copy_secs=0.5, exp_secs=0.25)
    by_bytes = measure.floor(2**30, 2**26, results, swept=2**25)
    assert (by_bytes["bytes_secs"], by_bytes["exponentials_secs"], by_bytes["secs"]) == (1.0, 0.5, 1.0)
    by_exponentials = measure.floor(2**28, 2**26, results, swept=2**25)
    assert (by_exponentials["bytes_secs"], by_exponentials["secs"]) == (0.25, 0.5)


def test_a_short_sweep_of_exponentials_is_lengthened():
    floor = measure.floor(0, 2**20, speeds(copy_secs=1.0, exp_secs=1.0), swept=2**20)
    assert floor["exponentials_per_sec"] == 2**24


def test_the_bytes_of_a_scan_are_those_of_its_arguments_and_results():
    problem = selective_scan.Problem.parse("2x5x3x4")
    inputs, y = problem.inputs(), problem.cotangent()
    forward = sum(x.nbytes for x in inputs.values()) + y.nbytes
    assert problem.moved_bytes(backward=False) == forward
    # Backward: the cotangent, of y's size, and a gradient of each argument.
    assert problem.moved_bytes(backward=True) == 2 * forward
    assert problem.exponentials == 2 * 5 * 3 * 4


@pytest.mark.parametrize("text", ["2x5x3", "2x5x3x0", "a", "2x5x3x4x1"])
def test_a_malformed_problem_is_refused(text):
    with pytest.raises(ValueError, match="want BATCHxLENGTHxD_INNERxD_STATE"):
        selective_scan.Problem.parse(text)


RESULT_FIELDS = {
    "name",
    "median_secs",
    "quartiles_secs",
    "samples_secs",
    "temporary_bytes",
    "skipped",
    "ratio_to_floor",
    "ratio_to_associative",
    "secs_per_token",
}


@pytest.fixture
def small_copy(monkeypatch):
    monkeypatch.setattr(measure, "COPIED_FLOATS", 2**16)


def test_the_scans_benchmark_writes_what_it_documents(tmp_path, small_copy, monkeypatch, capsys):
    monkeypatch.setattr(selective_scan, "implementations", lambda: ["xla", "associative"])
    path = tmp_path / "scan.json"
    selective_scan.main(problems=("2x3x4x2",), sweep=True, lengths=(2,), repeats=2, json=path)
    report = json.loads(path.read_text())
    assert set(report) == {"benchmark", "machine", "settings", "problems", "sweep"}
    assert {"cpu", "cores", "backend", "packages", "date"} <= set(report["machine"])
    assert report["machine"]["packages"]["jax"] == jax.__version__
    records = report["problems"] + report["sweep"]
    assert [(r["problem"]["length"], r["direction"]) for r in records] == [
        (length, direction) for length in (3, 2) for direction in ("forward", "forward and backward")
    ]
    for record in records:
        assert {"problem", "direction", "floor", "results"} == set(record)
        results = {result["name"]: result for result in record["results"]}
        assert set(results) == {"floor: copy", "floor: exp", "xla", "associative"}
        associative = results["associative"]["median_secs"]
        for result in results.values():
            assert set(result) == RESULT_FIELDS
            assert result["skipped"] is None
            assert len(result["samples_secs"]) == 2
            assert result["median_secs"] == pytest.approx(np.median(result["samples_secs"]))
            assert result["ratio_to_floor"] == pytest.approx(result["median_secs"] / record["floor"]["secs"])
            assert result["ratio_to_associative"] == pytest.approx(result["median_secs"] / associative)
    printed = capsys.readouterr().out
    assert "Microseconds per token, forward" in printed
    assert "B=2 L=3 D=4 N=2, forward and backward. Floor" in printed


def test_what_took_too_long_is_left_out_of_larger_problems(small_copy, monkeypatch):
    monkeypatch.setattr(selective_scan, "implementations", lambda: ["reference"])
    benchmark = selective_scan.Benchmark(repeats=1, budget_secs=1e-9, with_peers=False)
    benchmark.measure(selective_scan.Problem(1, 2, 3, 2), "forward")
    record = benchmark.measure(selective_scan.Problem(1, 4, 3, 2), "forward")
    skipped = {result["name"]: result["skipped"] for result in record["results"]}
    assert skipped.pop("reference").startswith("over ")
    assert skipped == {"floor: copy": None, "floor: exp": None}


def test_every_implementation_that_runs_here_is_measured():
    portable = {name for name in api.IMPLEMENTATIONS if name not in api.SUPPORT_CHECKS}
    names = selective_scan.implementations()
    assert names[0] == "xla"
    assert set(names) == portable


def test_a_benchmark_runs_from_the_repository_as_a_command():
    command = [sys.executable, "benchmarks/selective_scan.py", "--help"]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    assert "--sweep" in finished.stdout


def test_ssd_is_timed_beside_the_scan(tmp_path, capsys):
    ssd.main(problems=("2x3x8x2",), d_head=4, repeats=2, json=tmp_path / "ssd.json")
    forward, backward = json.loads((tmp_path / "ssd.json").read_text())["problems"]
    for record in (forward, backward):
        scan, dual = record["results"]
        assert [scan["name"], dual["name"]] == ["selective_scan", "ssd"]
        assert record["ratio"] == dual["median_secs"] / scan["median_secs"]
        assert len(dual["samples_secs"]) == 2
    assert "B=2 L=3 D=8 N=2, forward and backward" in capsys.readouterr().out


def test_ssd_gets_the_first_step_size_of_each_head():
    inputs = selective_scan.Problem(2, 3, 8, 2).inputs()
    of_ssd = ssd.ssd_inputs(inputs, d_head=4)
    np.testing.assert_array_equal(of_ssd["delta"], inputs["delta"][:, :, [0, 4]])
    np.testing.assert_array_equal(of_ssd["A"], [-1.0, -2.0])


def test_an_absent_peer_is_named_with_the_cure(monkeypatch):
    monkeypatch.setitem(peers.PACKAGES, "mambapy", ("numpy", "a_package_that_is_not_there"))
    assert peers.absent(["mambapy"]) == [
        "peer 'mambapy' left out: a_package_that_is_not_there not installed (pip install a_package_that_is_not_there)"
    ]


def test_with_no_peer_installed_attention_remains(monkeypatch):
    monkeypatch.setattr(peers, "PACKAGES", {name: ("a_package_that_is_not_there",) for name in peers.PACKAGES})
    problem = selective_scan.Problem(1, 4, 128, 2)
    assert peers.peer_candidates(problem.inputs(), None) == []
    (attention,) = peers.attention_candidates(1, 4, 128, backward=True)
    out, gradients = attention.run()
    assert [x.shape for x in (out, *gradients)] == [(1, 4, 2, 64)] * 4


@pytest.mark.parametrize("peer", ["mambapy", "transformers"])
def test_an_installed_peer_agrees(peer, small_copy):
    if peers.absent([peer]):
        pytest.skip(peers.absent([peer])[0])
    problem = selective_scan.Problem(2, 9, 4, 3)
    inputs, cotangent = problem.inputs(), problem.cotangent()
    ours = selective_scan.scan_candidate("xla", inputs, cotangent).run()
    (candidate,) = [c for c in peers.peer_candidates(inputs, cotangent) if c.name == peer]
    assert measure.relative_error(candidate.run(), ours) < 1e-5


@pytest.mark.parametrize("order", [ORDERS["interleaved"][i] for i in (0, 3, 5, 6)], ids=str)
@pytest.mark.parametrize("variant", scan_orders.VARIANTS)
def test_every_variant_goes_there_and_back(variant, order):
    x, cotangent = jax.random.normal(jax.random.key(0), (2, 1, 4, 6, 2))
    forward, gradient = (
        jax.jit(scan_orders.directed(scan_orders.VARIANTS[variant], order, direction))
        for direction in scan_orders.DIRECTIONS
    )
    np.testing.assert_array_equal(forward(x), x)
    np.testing.assert_array_equal(gradient(x, cotangent), cotangent)


def test_every_variant_of_the_convolution_agrees():
    x, cotangent = jax.random.normal(jax.random.key(0), (2, 1, 5, 4, 3))
    kernel = jax.random.normal(jax.random.key(1), (3, 3, 3))
    results = [
        jax.jit(depthwise_conv.directed(function, "gradient"))(x, kernel, cotangent)
        for function in depthwise_conv.VARIANTS.values()
    ]
    assert all(measure.relative_error(result, results[0]) < 1e-5 for result in results)


SMALL = ModelConfig(depth=3, d_model=32, d_state=4, mlp_ratio=2.0, patch_size=1)


def test_flops_of_a_layer_are_those_counted_by_hand():
    length, d, m, n, rank = 64, 32, 64, 4, 2

    def flops(config):
        work = denoiser.work_of_layer(denoiser.random_block(config), 8, d)
        return {part: sum(one.flops() for one in work if one.part == part) for part in denoiser.PARTS}

    sisma = flops(SMALL)
    # Each mixer: into u and z, out, and C; Self-Mamba also Δ and B, and Δ's second factor. The mask is read before.
    projections = 2 * length * (2 * (d * 2 * m + m * d + m * n) + m * (rank + n) + rank * m)
    assert sisma["projections"] == pytest.approx(projections, rel=0.01)
    assert sisma["attention"] == 0
    # Two streams of nine taps, less what falls over the border, and what is elementwise.
    assert sisma["convolution"] == pytest.approx(2 * 2 * 9 * length * m, rel=0.3)
    # exp, and h = a h + b u, y = c h: about six operations a state, in two scans.
    assert 5 <= sisma["scan"] / (2 * length * m * n) <= 12
    dit = flops(ModelConfig(**{**vars(SMALL), "backbone": "dit"}))
    assert dit["attention"] == pytest.approx(2 * 4 * length**2 * d, rel=0.5)  # and softmax
    assert dit["projections"] == pytest.approx(2 * 6 * length * d * d, rel=0.05)
    assert dit["feed-forward"] == sisma["feed-forward"]


def test_layers_are_counted_where_they_work():
    assert denoiser.layers_at(SMALL, 32) == {32: 3}
    u = ModelConfig(**{**vars(SMALL), "depth": 1, "level_depths": (1, 2)})
    assert denoiser.layers_at(u, 32) == {32: 2, 16: 4, 8: 1}


@pytest.mark.parametrize(
    ("conditioning", "of_baseline"), [("cross", "cross"), ("concat", "concat"), ("cross", "concat")]
)
@pytest.mark.parametrize("name", ["S", "B", "L", "XL"])
def test_the_matched_baseline_has_the_same_parameters(name, conditioning, of_baseline):
    sisma = preset(name, mask_conditioning=conditioning)

    def count(model):
        params = jax.eval_shape(lambda: init_params(Config(model=model), jax.random.key(0)))
        return sum(leaf.size for leaf in jax.tree.leaves(params))

    baseline = denoiser.matched_dit(sisma, of_baseline)
    assert baseline.mask_conditioning == of_baseline
    assert count(baseline) == pytest.approx(count(sisma), rel=0.05)


@pytest.mark.slow
def test_the_denoiser_benchmark_measures_every_model(monkeypatch, tmp_path):
    u = ModelConfig(**{**vars(SMALL), "depth": 1, "level_depths": (1,)})
    dit = ModelConfig(**{**vars(SMALL), "backbone": "dit"})
    monkeypatch.setattr(denoiser, "models", lambda size: {"SISMA-S": SMALL, "U": u, "DiT": dit})
    denoiser.main(size="S", tokens=(64,), repeats=1, json=tmp_path / "report.json")
    report = json.loads((tmp_path / "report.json").read_text())
    (problem,) = report["problems"]
    assert [result["name"] for result in problem["results"]] == ["SISMA-S", "U", "DiT"]
    for result in problem["results"]:
        assert result["median_secs"] > 0
        assert sum(part["secs"] for part in result["parts"].values()) > 0
    assert problem["results"][2]["parts"]["scan"] == {"secs": 0, "flops": 0}


@pytest.mark.slow
def test_forward_mode_is_measured_beside_the_function(monkeypatch, tmp_path):
    config = Config(data=DataConfig(image_size=8), model=dataclasses.replace(SMALL, depth=1, patch_size=4))
    monkeypatch.setattr(forward_mode.config_files, "load", lambda path: config)
    forward_mode.main(batch=1, repeats=1, json=tmp_path / "report.json")
    results = json.loads((tmp_path / "report.json").read_text())["results"]
    assert [result["name"] for result in results] == [
        "function evaluation",
        "with derivative",
        "gradient of flow matching",
        "gradient of mean flow",
    ]
    assert all(result["median_secs"] > 0 for result in results)


def test_thin_parts_are_lost_by_resizing_and_kept_by_the_mask_encoder():
    masks = np.stack([draw_face(np.random.default_rng(seed), 64)[1] for seed in range(50)])
    fit, test = masks[:40], masks[40:]
    encoder = MaskEncoder(8, len(CELEBAMASK_HQ), 32, 256, dtype=jnp.dtype("float32"), rngs=nnx.Rngs(0))
    read = thin_parts.iou(thin_parts.read_back(encoder, fit, test), test)
    resized = thin_parts.iou(thin_parts.nearest(test), test)
    for name in ("l_brow", "r_brow", "u_lip", "l_lip"):
        assert read[CELEBAMASK_HQ.index[name]] > resized[CELEBAMASK_HQ.index[name]] + 0.2
    np.testing.assert_array_equal(thin_parts.over_tokens(thin_parts.under_tokens(test)), test)
    assert np.nanmin(thin_parts.iou(test, test)) == 1


def test_the_datas_way_is_measured_from_files_to_batches(tmp_path, capsys):
    data.main(num_faces=20, batches=2, repeats=2, num_threads=2, steps=False, json=tmp_path / "data.json")
    (problem,) = json.loads((tmp_path / "data.json").read_text())["problems"]
    samples = problem["examples_per_sec"]
    assert {name: len(rates) for name, rates in samples.items()} == {
        "raw files to shards": 1,
        "JPEG at 256 px": 2,
        "cached latents": 2,
    }
    assert all(rate > 0 for rates in samples.values() for rate in rates)
    assert "cached latents: the process grew by" in capsys.readouterr().out


def test_the_loop_and_its_bare_step_take_turns():
    """After a warm-up of five steps; the last block of the loop ends where the next one would begin."""
    turns = loop_overhead.Turns(iter(range(100)), steps=3)
    clock, order = Clock(), []

    def work(name, secs):
        order.append(name)
        clock.work(secs)

    turns.clock, turns.bare = clock, lambda: work("bare", 2.0)
    for _ in range(5 + 2 * 3 + 1):
        next(turns)
        work("loop", 3.0)
    assert order == [*["loop"] * 5, *(["bare"] * 3 + ["loop"] * 3) * 2, *["bare"] * 3, "loop"]
    assert turns.loop_secs == [9.0, 9.0]
    assert turns.bare_secs == [6.0, 6.0, 6.0]


def test_an_ablation_at_equal_time_gives_slow_variants_fewer_steps():
    variants = {"first": ({}, 1), "slow": ({}, None), "fast": ({}, None), "longer": ({}, 1.6)}
    secs = {"first": 0.2, "slow": 0.4, "fast": 0.16, "longer": 9.0}
    counts = ablation.step_counts(variants, 400, secs)
    assert counts == {"first": 400, "slow": 200, "fast": 500, "longer": 640}


@pytest.mark.parametrize("study", ablation.STUDIES)
def test_the_variants_of_an_ablation_are_configurations(study, tmp_path):
    for choices, _ in ablation.STUDIES[study].values():
        experiment = ablation.experiment(tmp_path, tmp_path, 400, 0, choices)
        assert all(getattr(experiment.model, name) == value for name, value in choices.items())
