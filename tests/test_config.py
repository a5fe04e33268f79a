import dataclasses
import json

import pytest

from sisma_jax import config as config_lib
from sisma_jax import config_files
from sisma_jax.config import Config, DataConfig, ModelConfig, SampleConfig, TrainConfig
from sisma_jax.errors import InputError


def write(tmp_path, body):
    path = tmp_path / "experiment.py"
    path.write_text(f"from sisma_jax.config import *\n\n\ndef get_config():\n    return {body}\n")
    return path


def test_json_round_trip():
    config = Config(model=ModelConfig(d_state=3, mlp_ratio=1.5), data=DataConfig(flip=False))
    assert config_files.from_json(config_files.to_json(config), "x") == config


def test_a_value_that_an_older_file_lacks_takes_its_default():
    values = json.loads(config_files.to_json(Config(sample=SampleConfig(steps=7))))
    for key in ("shift", "guidance_low", "guidance_high", "guidance_rescale"):
        del values["sample"][key]
    assert config_files.from_json(json.dumps(values), "x") == Config(sample=SampleConfig(steps=7))


def test_the_guided_interval_may_be_empty_and_not_less():
    SampleConfig(guidance_low=0.5, guidance_high=0.5)
    with pytest.raises(
        InputError, match=r"--sample.guidance_high must be in \[guidance_low, 1\] = \[0.6, 1\], got 0.5"
    ):
        SampleConfig(guidance_low=0.6, guidance_high=0.5)


@pytest.mark.parametrize("text", ["{", "[]", '{"model": {"nothing": 1}}', '{"other": {}}', '{"model": {"depth": "a"}}'])
def test_damaged_json_names_its_source(text):
    with pytest.raises(InputError, match=r"config.json|--model.depth"):
        config_files.from_json(text, "run/config.json")


def test_only_meaningful_differences_count():
    config = Config()
    longer = dataclasses.replace(config, train=TrainConfig(num_steps=7, log_every_steps=3))
    assert config_files.differences(config, longer) == []
    other = dataclasses.replace(config, train=TrainConfig(seed=5), data=DataConfig(image_size=128))
    assert config_files.differences(config, other) == [
        "--data.image_size: the run has 64, given 128",
        "--train.seed: the run has 0, given 5",
    ]


@pytest.mark.parametrize(
    ("section", "key", "value", "message"),
    [
        ("data", "image_size", 4, "--data.image_size must be in 8..2048, got 4"),
        ("data", "name", "imagenet", "--data.name must be one of 'synthetic_faces', 'celebamask_hq', got 'imagenet'"),
        ("data", "name", "celebamask_hq", "--data.root is empty"),
        ("model", "depth", 0, "--model.depth must be positive, got 0"),
        ("model", "depth", 1.5, "--model.depth must be of type int, got 1.5"),
        ("model", "depth", True, "--model.depth must be of type int, got True"),
        ("model", "d_conv", 4, "--model.d_conv must be odd"),
        ("model", "patch_size", 3, "--model.patch_size must be one of 1, 2, 4, 8, got 3"),
        ("flow", "mask_dropout", 1.0, "--flow.mask_dropout must be in"),
        ("optim", "learning_rate", "fast", "--optim.learning_rate must be of type float, got 'fast'"),
        ("optim", "decay_steps", -3, "--optim.decay_steps must be 0 or more than"),
        ("train", "batch_size", 0, "--train.batch_size must be positive"),
        ("sample", "guidance", -1.0, "--sample.guidance must be non-negative"),
        ("sample", "solver", "rk4", "--sample.solver must be one of 'euler', 'heun', 'midpoint', 'adams_bashforth'"),
        ("sample", "shift", 0.0, "--sample.shift must be in"),
        ("sample", "shift", float("nan"), "--sample.shift must be in"),
        ("sample", "guidance_low", -0.1, "--sample.guidance_low must be in"),
        ("sample", "guidance_low", 1.5, "--sample.guidance_low must be in"),
        ("sample", "guidance_high", 1.5, "--sample.guidance_high must be in"),
        ("sample", "guidance_rescale", 2.0, "--sample.guidance_rescale must be in"),
        ("evaluate", "num_samples", 0, "--evaluate.num_samples must be positive"),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(section, key, value, message):
    with pytest.raises(InputError, match=message):
        dataclasses.replace(getattr(Config(), section), **{key: value})


def test_patches_must_tile_the_image():
    with pytest.raises(
        InputError, match=r"--data.image_size 30 is not a multiple of 4: patches of --model.patch_size 4"
    ):
        Config(data=DataConfig(image_size=30), model=ModelConfig(patch_size=4))


def test_a_file_is_loaded(tmp_path):
    assert config_files.load(write(tmp_path, "Config(model=ModelConfig(depth=3))")).model.depth == 3


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("Config(model=ModelConfig(dstate=3))", "sets 'dstate', which is not a key. Perhaps you meant model.d_state"),
        ("Config(model=ModelConfig(zzzzzz=3))", "The keys are data.name"),
        ("Config(model=ModelConfig(d_state='x'))", "--model.d_state must be of type int"),
        ("3", "returns int, want sisma_jax.config.Config"),
    ],
)
def test_a_wrong_file_is_refused(tmp_path, body, message):
    with pytest.raises(InputError, match=message):
        config_files.load(write(tmp_path, body))


def test_a_missing_file_or_function_is_named(tmp_path):
    path = write(tmp_path, "Config()")
    with pytest.raises(InputError, match=r"other.py is not a Python file. There are .*experiment.py"):
        config_files.load(tmp_path / "other.py")
    path.write_text("x = 1\n")
    with pytest.raises(InputError, match="does not define get_config"):
        config_files.load(path)


def test_presets():
    assert config_lib.preset("XL", patch_size=4) == ModelConfig(depth=28, d_model=1152, patch_size=4)
    with pytest.raises(InputError, match="the presets are S, B, L, XL"):
        config_lib.preset("M")
