import dataclasses
import signal

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.profiler import ProfileData

from sisma_jax import pipeline
from sisma_jax.config import OptimConfig, Sampling
from sisma_jax.data.dataset import DataSet
from sisma_jax.errors import InputError, Preempted
from sisma_jax.runs.checkpoints import Checkpoints
from sisma_jax.runs.export import export_params
from sisma_jax.runs.folder import RunFolder
from sisma_jax.runs.metrics import MetricWriter, read_metrics
from sisma_jax.runs.ranking import BEST_METRICS
from sisma_jax.training import loop, optimizers, step
from sisma_jax.training.state import init_state
from tests.tiny import tiny_config
from tests.training.runs import assert_same, final_state, train


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory):
    path = tmp_path_factory.mktemp("data")
    DataSet.prepare(tiny_config(path).data)
    return path


def test_a_resumed_run_has_the_bits_of_an_unbroken_one(tmp_path, cache_dir):
    config = tiny_config(cache_dir, num_steps=6)
    train(config, tmp_path / "unbroken")
    train(tiny_config(cache_dir, num_steps=3), tmp_path / "broken")
    train(config, tmp_path / "broken")
    assert_same(final_state(tmp_path / "broken", config), final_state(tmp_path / "unbroken", config))
    losses = [
        [(line["step"], line["loss"]) for line in read_metrics(tmp_path / name / "metrics.jsonl")]
        for name in ("broken", "unbroken")
    ]
    assert losses[0] == losses[1]
    assert [step for step, _ in losses[0]] == [1, 2, 3, 4, 5, 6]


@pytest.mark.slow
def test_bfloat16_computes_with_float32_state_and_losses_close_to_those_of_float32(tmp_path, cache_dir):
    losses = {}
    for dtype in ("float32", "bfloat16"):
        config = tiny_config(cache_dir, compute_dtype=dtype)
        train(config, tmp_path / dtype)
        losses[dtype] = [line["loss"] for line in read_metrics(tmp_path / dtype / "metrics.jsonl")]
        _, (state, ema), _ = final_state(tmp_path / dtype, config)
        kinds = {x.dtype for x in jax.tree.leaves((state["params"], state["opt_state"], ema)) if x.dtype.kind == "f"}
        assert kinds == {np.dtype("float32")}
    np.testing.assert_allclose(losses["bfloat16"], losses["float32"], rtol=0.01)
    assert losses["bfloat16"] != losses["float32"]


def test_a_finished_run_is_left_as_it_is(tmp_path, cache_dir):
    config = tiny_config(cache_dir, num_steps=2)
    train(config, tmp_path)
    before = (tmp_path / "metrics.jsonl").read_text()
    train(config, tmp_path)
    assert (tmp_path / "metrics.jsonl").read_text() == before


def test_metrics_are_logged(tmp_path, cache_dir):
    train(tiny_config(cache_dir), tmp_path)
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert all(line["loss"] > 0 and line["grad_norm"] > 0 and line["examples_per_sec"] > 0 for line in lines)
    assert all(line["skipped_steps"] == 0 for line in lines)
    assert ["held_out_loss" in line for line in lines] == [False, True, False, True]
    assert list((tmp_path / "tensorboard").glob("events.*"))


def poison(monkeypatch, bad_steps):
    """Makes the loss of some steps NaN, and with it the gradient."""

    def make(draw, *arguments):
        def poisoned(batch, key):
            examples = draw(batch, key)
            return examples | {"x1": jnp.where(batch["is_bad"], jnp.nan, examples["x1"])}

        update = build_update(poisoned, *arguments)
        return lambda state, batch: update(state, batch | {"is_bad": jnp.isin(state.step + 1, jnp.array(bad_steps))})

    build_update = step.build_update
    monkeypatch.setattr(step, "build_update", make)


def test_steps_that_are_not_finite_are_skipped_and_counted(tmp_path, cache_dir, monkeypatch):
    config = tiny_config(cache_dir, num_steps=6, log_every_steps=3, checkpoint_every_steps=6)
    poison(monkeypatch, [2, 3, 5])
    train(config, tmp_path)
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["skipped_steps"] for line in lines] == [2, 1]
    assert all(np.isfinite(list(line.values())).all() for line in lines)
    _, (state, ema), _ = final_state(tmp_path, config)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((state["params"], state["opt_state"], ema)))
    assert state["skipped"] == 0
    counts = [x for path, x in jax.tree_util.tree_leaves_with_path(state["opt_state"]) if "count" in str(path)]
    assert counts
    assert all(count == 3 for count in counts)


@pytest.mark.parametrize("limit", [0, 2])
def test_too_many_of_them_in_a_row_stop_the_run_and_the_last_good_checkpoint_stays(
    tmp_path, cache_dir, monkeypatch, limit
):
    poison(monkeypatch, [4, 5, 6, 7])
    config = tiny_config(cache_dir, num_steps=8, max_skipped_steps=limit)
    last = 4 if limit else 2  # a state whose last update was skipped is a good one
    with pytest.raises(InputError, match=rf"loss is nan at step {4 + limit}; .*last good checkpoint, step {last}, is"):
        train(config, tmp_path)
    saved, (state, ema), _ = final_state(tmp_path, config)
    assert saved == last
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((state["params"], ema)))


def test_updates_that_are_not_finite_stop_the_run_too_and_no_checkpoint_has_them(tmp_path, cache_dir, monkeypatch):
    rate = optax.scale_by_schedule(lambda count: jnp.where(count < 3, -1e-3, jnp.inf))
    monkeypatch.setitem(optimizers._OPTIMIZERS, "adamw", lambda optim, schedule: rate)
    config = tiny_config(cache_dir, num_steps=8, max_skipped_steps=2)
    with pytest.raises(InputError, match=r"the update is not finite at step 6; .* 3 updates .* step 4, is kept"):
        train(config, tmp_path)
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["skipped_steps"] for line in lines] == [0, 0, 0, 1, 1]
    saved, (state, ema), _ = final_state(tmp_path, config)
    assert saved == 4
    chex.assert_tree_all_finite((state["params"], ema))


def test_a_run_that_another_job_has_taken_over_saves_no_more(tmp_path, cache_dir):
    config, asked = tiny_config(cache_dir), []

    def lost():
        if len(asked) == 1:
            raise InputError("it was taken over")
        asked.append(True)

    with RunFolder.writing(tmp_path, config) as run:
        run._require_lock = lost
        with pytest.raises(InputError, match="taken over"):
            loop.train(run, DataSet.open(config.data))
    assert final_state(tmp_path, config)[0] == 2


def test_a_second_training_of_a_run_is_refused_and_harms_nothing(tmp_path, cache_dir):
    config = tiny_config(cache_dir, num_steps=2)
    train(config, tmp_path)
    with RunFolder.writing(tmp_path, config):
        with pytest.raises(InputError, match="is being written by process"):
            train(config, tmp_path)
    assert final_state(tmp_path, config)[0] == 2


def test_every_array_of_a_batch_reaches_the_update_but_the_ids(tmp_path, cache_dir, monkeypatch):
    seen = []

    def recorded(draw, *arguments):
        def draw_and_record(batch, key):
            seen.append({name: x.shape for name, x in batch.items()})
            return draw({name: x for name, x in batch.items() if name != "style"}, key)

        return build_update(draw_and_record, *arguments)

    class Styled:
        def __init__(self, batches):
            self._batches = batches

        def __next__(self):
            return next(self._batches) | {"style": np.ones((8, 5), np.float32)}

        def __getattr__(self, name):
            return getattr(self._batches, name)

    build_update, train_batches = step.build_update, DataSet.train_batches
    monkeypatch.setattr(step, "build_update", recorded)
    monkeypatch.setattr(DataSet, "train_batches", lambda *arguments: Styled(train_batches(*arguments)))
    train(tiny_config(cache_dir, num_steps=1), tmp_path)
    assert seen[0] == {"image": (8, 16, 16, 3), "mask": (8, 16, 16), "style": (8, 5)}


def test_some_steps_are_traced(tmp_path, cache_dir):
    train(tiny_config(cache_dir, num_steps=3, profile_steps="2-3"), tmp_path)
    (trace,) = (tmp_path / "profile").rglob("*.xplane.pb")
    events = {
        event.name
        for plane in ProfileData.from_file(str(trace)).planes
        for line in plane.lines
        for event in line.events
    }
    assert any("update" in name for name in events)


def test_sigterm_in_a_program_of_ones_own_saves_and_raises(tmp_path, cache_dir, monkeypatch):
    config = tiny_config(cache_dir, num_steps=8, checkpoint_every_steps=8)
    write = MetricWriter.write

    def signalled(self, step, values):
        write(self, step, values)
        if step == 3:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(MetricWriter, "write", signalled)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Preempted, match="step 4 is saved") as stopped:
        train(config, tmp_path)
    assert stopped.value.code == 75
    assert signal.getsignal(signal.SIGTERM) == before
    assert final_state(tmp_path, config)[0] == 4
    monkeypatch.undo()
    train(config, tmp_path)
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == list(range(1, 9))


def test_the_best_checkpoint_is_kept_besides_the_newest(tmp_path, cache_dir, monkeypatch):
    measured = iter([3.0, 1.0, 2.0, 4.0])
    monkeypatch.setattr(loop, "held_out_losses", lambda *arguments: np.array([next(measured)]))
    config = tiny_config(cache_dir, num_steps=4, checkpoint_every_steps=1, keep_checkpoints=1)
    train(config, tmp_path)
    with Checkpoints(tmp_path / "checkpoints", best=BEST_METRICS["held_out_loss"], read_only=True) as checkpoints:
        assert checkpoints.steps() == [2, 4]
        assert checkpoints.best_step() == 2


def test_a_run_begins_with_exported_parameters(tmp_path, cache_dir):
    config = tiny_config(cache_dir, num_steps=1)
    params = jax.tree.map(lambda x: x + 0.5, jax.jit(lambda: init_state(config))().params)
    export_params(tmp_path / "model.safetensors", config, 7, params)

    def begun(**model):
        changed = dataclasses.replace(config, model=dataclasses.replace(config.model, **model))
        train = dataclasses.replace(config.train, init_from=str(tmp_path / "model.safetensors"))
        return dataclasses.replace(changed, train=train, optim=OptimConfig(learning_rate=1e-12))

    train(begun(), tmp_path / "run")
    _, (state, ema), _ = final_state(tmp_path / "run", config)
    for tree in (state["params"], ema):
        chex.assert_trees_all_close(tree, params, rtol=1e-6)
    with pytest.raises(InputError, match=r"(?s)^train.init_from .*safetensors is of another model:.*A_log"):
        train(begun(d_state=8), tmp_path / "other")
    assert not (tmp_path / "other" / "checkpoints").exists() or not list((tmp_path / "other/checkpoints").iterdir())


def test_a_mean_flow_begins_with_a_model_of_flow_matching(tmp_path, cache_dir):
    config = tiny_config(cache_dir, num_steps=1)
    # A new model predicts zeros; this one does not.
    rng = np.random.default_rng(0)
    given = jax.jit(lambda: init_state(config))().params
    given = jax.tree.map(lambda x: x + jnp.asarray(rng.normal(0, 0.05, x.shape), jnp.float32), given)
    export_params(tmp_path / "model.safetensors", config, 7, given)
    train_config = dataclasses.replace(config.train, init_from=str(tmp_path / "model.safetensors"))
    flow = dataclasses.replace(config.flow, objective="mean_flow")
    few = dataclasses.replace(
        config, train=train_config, flow=flow, optim=OptimConfig(learning_rate=1e-12), sample=Sampling(steps=1)
    )
    train(few, tmp_path / "run")
    _, (state, _), _ = final_state(tmp_path / "run", few)
    params = state["params"]
    for part in (params.pop("duration"), params["condition_encoder"].pop("guidance")):
        assert np.abs(part["down"]["kernel"]).max() < 1e-6
        assert np.abs(part["up"]["kernel"]).max() > 0.01
    chex.assert_trees_all_close(params, given, rtol=1e-6, atol=1e-10)
    assert "velocity_error" in read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]

    pipe = pipeline.load(tmp_path / "run")
    mask = np.full((16, 16), 1, np.uint8)
    faces = [pipe(mask, key=jax.random.key(0), steps=steps) for steps in (1, 2)]
    assert (faces[0] != faces[1]).any()
    with pytest.raises(InputError, match=r"sample.guidance must be in \[1, 3.0\]"):
        pipe(mask, key=jax.random.key(0), guidance=5.0)
    export_params(tmp_path / "few.safetensors", few, 1, pipe.params)
    train_config = dataclasses.replace(train_config, init_from=str(tmp_path / "few.safetensors"))
    with pytest.raises(InputError, match=r"(?s)of another model:.*duration"):
        train(dataclasses.replace(config, train=train_config), tmp_path / "other")
    wrong = dataclasses.replace(few, flow=dataclasses.replace(flow, prediction="velocity"))
    with pytest.raises(InputError, match=r"predicts data; set flow\.prediction to data"):
        train(wrong, tmp_path / "another")


def test_another_configuration_is_refused_and_harms_nothing(tmp_path, cache_dir):
    config = tiny_config(cache_dir, num_steps=2)
    train(config, tmp_path)
    other = dataclasses.replace(config, model=dataclasses.replace(config.model, d_state=2))
    with pytest.raises(InputError, match=r"\n  model.d_state: the run has 4, given 2"):
        train(other, tmp_path)
    assert final_state(tmp_path, config)[0] == 2


def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(tmp_path, cache_dir, caplog):
    config = tiny_config(cache_dir)
    train(config, tmp_path)
    want = final_state(tmp_path, config)
    largest = max((tmp_path / "checkpoints" / "4").rglob("*"), key=lambda p: p.stat().st_size if p.is_file() else 0)
    largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])
    train(config, tmp_path)
    assert "checkpoint of step 4" in caplog.text
    assert "damaged" in caplog.text
    assert_same(final_state(tmp_path, config), want)


def test_a_batch_that_the_devices_cannot_share_is_refused(tmp_path, cache_dir):
    with pytest.raises(InputError, match=r"^train.batch_size 6 is not a multiple of the 8 devices"):
        train(tiny_config(cache_dir, batch_size=6), tmp_path)
