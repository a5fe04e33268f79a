import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from sisma_jax import config as config_lib
from sisma_jax import config_files
from sisma_jax.config import Config, DataConfig, MeshConfig, ModelConfig, Sampling, TrainConfig
from sisma_jax.data.classes import CELEBAMASK_HQ, ClassSet
from sisma_jax.errors import InputError


def write(tmp_path, body):
    path = tmp_path / "experiment.py"
    path.write_text(f"from sisma_jax.config import *\n\n\ndef get_config():\n    return {body}\n")
    return path


def test_json_round_trip():
    config = Config(model=ModelConfig(d_state=3, mlp_ratio=1.5), data=DataConfig(flip=False))
    assert config_files.from_json(config_files.to_json(config), "x") == config


def test_a_value_that_an_older_file_lacks_takes_its_default():
    values = json.loads(config_files.to_json(Config(sample=Sampling(steps=7))))
    for key in ("shift", "guidance_low", "guidance_high", "guidance_rescale"):
        del values["sample"][key]
    assert config_files.from_json(json.dumps(values), "x") == Config(sample=Sampling(steps=7))


def test_the_guided_interval_may_be_empty_and_not_less():
    Sampling(guidance_low=0.5, guidance_high=0.5)
    with pytest.raises(InputError, match=r"sample.guidance_high must be in \[guidance_low, 1\] = \[0.6, 1\], got 0.5"):
        Sampling(guidance_low=0.6, guidance_high=0.5)


@pytest.mark.parametrize("sections", ['"model": {"nothing": 1}', '"other": {}', '"model": {"depth": "a"}'])
def test_json_of_other_keys_or_values_names_its_source(sections):
    with pytest.raises(InputError, match=r"config.json is not a configuration|model.depth must be"):
        config_files.from_json(f'{{"version": {config_files.VERSION}, {sections}}}', "run/config.json")


@pytest.mark.parametrize("text", ["{", "[]", "3"])
def test_damaged_json_names_its_source(text):
    with pytest.raises(InputError, match=r"config.json is not a configuration"):
        config_files.from_json(text, "run/config.json")


@pytest.mark.parametrize("version", ['"version": 1, ', '"version": 99, ', ""])
def test_a_configuration_of_another_version_is_refused_in_one_line(version):
    with pytest.raises(InputError, match=r"run/config.json is of version .* of the configuration") as refused:
        config_files.from_json(f'{{{version}"sample": {{"guided": 1}}}}', "run/config.json")
    assert "\n" not in str(refused.value)


def test_only_meaningful_differences_count():
    config = Config()
    longer = dataclasses.replace(config, train=TrainConfig(num_steps=7, log_every_steps=3))
    assert config_files.differences(config, longer) == []
    other = dataclasses.replace(config, train=TrainConfig(seed=5), data=DataConfig(image_size=128))
    assert config_files.differences(config, other) == [
        "data.image_size: the run has 64, given 128",
        "train.seed: the run has 0, given 5",
    ]


@pytest.mark.parametrize(
    ("section", "key", "value", "message"),
    [
        ("data", "image_size", 4, r"data.image_size must be in \[8, 2048\], got 4"),
        ("data", "name", "imagenet", "data.name must be one of 'synthetic_faces', 'celebamask_hq', got 'imagenet'"),
        ("data", "name", "celebamask_hq", "data.root is empty"),
        ("model", "depth", 0, "model.depth must be positive, got 0"),
        ("model", "depth", 1.5, "model.depth must be of type int, got 1.5"),
        ("model", "depth", True, "model.depth must be of type int, got True"),
        ("model", "d_conv", 4, "model.d_conv must be odd"),
        ("model", "patch_size", 3, "model.patch_size must be one of 1, 2, 4, 8, got 3"),
        ("flow", "mask_dropout", 1.0, "flow.mask_dropout must be in"),
        ("optim", "learning_rate", "fast", "optim.learning_rate must be of type float, got 'fast'"),
        ("optim", "decay_steps", -3, "optim.decay_steps must be non-negative"),
        ("optim", "b1", 1.0, r"optim.b1 must be in \[0, 1\), got 1.0"),
        ("optim", "b2", 1, r"optim.b2 must be in \[0, 1\), got 1"),
        ("optim", "b2", -0.1, r"optim.b2 must be in \[0, 1\)"),
        ("model", "level_depths", (1, 0), "model.level_depths must be numbers that are each positive"),
        ("model", "level_depths", 3, "model.level_depths must be a tuple of int, got 3"),
        ("train", "batch_size", 0, "train.batch_size must be positive"),
        ("sample", "guidance", -1.0, r"sample.guidance must be in \[0, 100\], got -1.0"),
        ("sample", "guidance", 1e38, r"sample.guidance must be in \[0, 100\], got 1e\+38"),
        ("sample", "seed", 2**32, r"sample.seed must be in \[0, 4294967295\], got 4294967296"),
        ("sample", "solver", "rk4", "sample.solver must be one of 'euler', 'heun', 'midpoint', 'adams_bashforth'"),
        ("sample", "shift", 0.0, "sample.shift must be in"),
        ("sample", "shift", float("nan"), "sample.shift must be finite"),
        ("sample", "guidance_low", -0.1, "sample.guidance_low must be in"),
        ("sample", "guidance_low", 1.5, "sample.guidance_low must be in"),
        ("sample", "guidance_high", 1.5, "sample.guidance_high must be in"),
        ("sample", "guidance_rescale", 2.0, "sample.guidance_rescale must be in"),
        ("evaluate", "num_samples", 0, "evaluate.num_samples must be positive"),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(section, key, value, message):
    with pytest.raises(InputError, match=message):
        dataclasses.replace(getattr(Config(), section), **{key: value})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"d_model": 96, "expand": 1},
            "model.d_head must be a divisor of model.expand times model.d_model, 96, got 64",
        ),
        ({"backbone": "dit"}, "model.backbone must be 'sisma' with model.mixer ssd, got 'dit'"),
        ({"scan_implementation": "xla"}, "model.scan_implementation must be 'auto' with model.mixer ssd, got 'xla'"),
    ],
)
def test_what_ssd_cannot_do_is_refused(values, message):
    with pytest.raises(InputError, match=message):
        ModelConfig(mixer="ssd", **values)
    ModelConfig(**values)


def test_ssd_on_a_sharded_sequence_is_refused():
    model, mesh = ModelConfig(mixer="ssd"), MeshConfig(seq=2)
    with pytest.raises(InputError, match=r"mesh\.seq 2 shards the sequence, which model\.mixer ssd does not support"):
        Config(model=model, mesh=mesh)
    Config(model=model)
    Config(mesh=mesh)


def test_patches_must_tile_the_image():
    with pytest.raises(InputError, match=r"data.image_size 30 is not a multiple of 4 \(model.patch_size 4\)"):
        Config(data=DataConfig(image_size=30), model=ModelConfig(patch_size=4))


def test_a_file_is_loaded(tmp_path):
    assert config_files.load(write(tmp_path, "Config(model=ModelConfig(depth=3))")).model.depth == 3


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (
            "Config(model=ModelConfig(dstate=3))",
            "line 5: 'dstate' is not a configuration key. Perhaps you meant model.d_state",
        ),
        ("Config(model=ModelConfig(zzzzzz=3))", "The keys are data.name"),
        ("Config(model=ModelConfig(d_state='x'))", "line 5: model.d_state must be of type int"),
        ("3", "line 4: get_config\\(\\) returns int, want sisma_jax.config.Config"),
    ],
)
def test_a_wrong_file_is_refused(tmp_path, body, message):
    with pytest.raises(InputError, match=message):
        config_files.load(write(tmp_path, body))


def test_a_missing_file_or_function_is_named(tmp_path):
    path = write(tmp_path, "Config()")
    with pytest.raises(InputError, match=r"other.py is not a Python file. There are .*experiment.py"):
        config_files.load(tmp_path / "other.py")
    path.write_text("x = 1\ny = 2\n")
    with pytest.raises(InputError, match=r"experiment.py, line 2: the file ends without get_config\(\)"):
        config_files.load(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1\ndef get_config(:\n", r"experiment.py, line 2: invalid syntax"),
        ("x = 1\n\ny = z\n", r"experiment.py, line 3: NameError: name 'z' is not defined"),
        ("def get_config():\n    x = 0\n    return 1 / x\n", r"experiment.py, line 3: ZeroDivisionError"),
        ("import nothing_of_this_name\n", r"experiment.py, line 1: ModuleNotFoundError"),
    ],
)
def test_a_file_that_cannot_be_run_is_refused_by_its_line(tmp_path, monkeypatch, text, message):
    path = tmp_path / "experiment.py"
    path.write_text(text)
    for name in (path, Path("experiment.py")):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(InputError, match=message) as refused:
            config_files.load(name)
        assert "\n" not in str(refused.value)


def test_the_home_is_expanded(tmp_path, monkeypatch):
    write(tmp_path, "Config(model=ModelConfig(depth=3))")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert config_files.load(Path("~/experiment.py")).model.depth == 3


def test_scalars_of_numpy_are_the_numbers_that_they_are():
    model = ModelConfig(
        depth=np.int64(3), mlp_ratio=np.float32(1.5), mixer_skip=np.bool_(True), level_depths=(np.int8(2),)
    )
    assert model == ModelConfig(depth=3, mlp_ratio=1.5, mixer_skip=True, level_depths=(2,))
    assert all(type(x) is int for x in (model.depth, *model.level_depths))
    with pytest.raises(InputError, match=r"model\.depth must be of type int"):
        ModelConfig(depth=np.float32(3))


FLOATS = [key for key, field in config_files.keys().items() if field.type is float]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("key", FLOATS)
def test_every_number_is_finite(key, value):
    section, name = key.split(".")
    with pytest.raises(InputError, match=f"{key} must be finite, got"):
        dataclasses.replace(getattr(Config(), section), **{name: value})


def test_the_class_set_travels_with_the_configuration():
    five = ClassSet("Five", tuple("abcde"), tuple((i, i, i) for i in range(5)), (("a", "b"),), 255)
    config = Config(data=DataConfig(name="celebamask_hq", root="x", classes=five))
    read = config_files.from_json(config_files.to_json(config), "x")
    assert read == config
    assert read.data.classes.names == tuple("abcde")
    default = dataclasses.replace(config, data=dataclasses.replace(config.data, classes=CELEBAMASK_HQ))
    (line,) = config_files.differences(default, config)
    assert line.startswith("data.classes: the run has ClassSet(title='CelebAMask-HQ'")
    with pytest.raises(InputError, match="drawn with the classes of CelebAMask-HQ"):
        DataConfig(classes=five)


def test_what_may_change_on_resume_is_stated_at_the_field():
    may_change = {key for key, field in config_files.keys().items() if field.metadata.get("may_change")}
    assert {"train.num_steps", "sample.steps", "mesh.fsdp", "data.root", "evaluate.num_samples"} <= may_change
    assert (
        not {"model.depth", "train.batch_size", "optim.learning_rate", "data.classes", "flow.prediction"} & may_change
    )


def test_presets():
    assert config_lib.preset("XL", patch_size=4) == ModelConfig(depth=28, d_model=1152, patch_size=4)
    with pytest.raises(InputError, match="the presets are S, B, L, XL"):
        config_lib.preset("M")
