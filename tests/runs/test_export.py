"""Export: one file is enough to sample, and what is wrong with a file is named."""

import dataclasses
import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from flax import nnx

from sisma_jax import config_files
from sisma_jax.data.classes import CELEBAMASK_HQ
from sisma_jax.errors import InputError
from sisma_jax.models.autoencoder import IdentityAutoencoder, KlAutoencoder, KlConfig
from sisma_jax.models.face_parser import FaceParser, make_graph
from sisma_jax.models.face_parser import init_params as parser_params
from sisma_jax.models.factory import init_params
from sisma_jax.pipeline import Pipeline
from sisma_jax.runs import flat_trees
from sisma_jax.runs.export import export_params, load_exported, read_config
from tests.bucket import make_bucket
from tests.runs.checkpoint_cases import assert_same
from tests.tiny import tiny_config, tiny_latent_config

SIZES = KlConfig(block_channels=(4, 8), layers_per_block=1, norm_groups=4, scale=0.5, shift=0.25)


@pytest.fixture(scope="module")
def config():
    return tiny_config(Path("data"))


def random_like(abstract):
    """Arrays of these shapes, without the seconds that it takes to compile an initialisation."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape), x.dtype), abstract)


def random_params(config):
    return random_like(jax.eval_shape(lambda: init_params(config, jax.random.key(0))))


def weights_of(autoencoder):
    return nnx.to_pure_dict(nnx.split(autoencoder)[1])


@pytest.fixture(scope="module")
def params(config):
    return random_params(config)


@pytest.fixture
def exported(config, params, tmp_path):
    path = tmp_path / "folder" / "model.safetensors"
    export_params(path, config, 1200, params)
    return path


def read(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    with safetensors.safe_open(path, framework="numpy") as content:
        return {name: content.get_tensor(name) for name in content.keys()}, content.metadata()


def test_parameters_configuration_and_step_come_back(config, params, exported):
    result = load_exported(exported)
    assert (result.config, result.step) == (config, 1200)
    assert isinstance(result.autoencoder, IdentityAutoencoder)
    assert_same(result.params, params)
    assert [path.name for path in exported.parent.iterdir()] == ["model.safetensors"]


def test_a_model_with_ssd_comes_back(config, tmp_path):
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, mixer="ssd", d_head=8))
    params = random_params(config)
    export_params(tmp_path / "model.safetensors", config, 1, params)
    result = load_exported(tmp_path / "model.safetensors")
    assert result.config == config
    assert_same(result.params, params)


def test_any_reader_of_safetensors_finds_the_parameters_by_their_paths(params, exported):
    arrays, metadata = read(exported)
    kernel = params["layers"]["stacked"]["mixer"]["in_proj"]["kernel"]
    np.testing.assert_array_equal(arrays["layers.stacked.mixer.in_proj.kernel"], kernel)
    assert json.loads(metadata["config"])["model"]["depth"] == 1
    assert metadata["step"] == "1200"


def test_autoencoder_comes_with_a_denoiser_of_latents(tmp_path):
    config = tiny_latent_config(Path("data"))
    params = random_params(config)
    graph, abstract = nnx.split(nnx.eval_shape(lambda: KlAutoencoder(SIZES, rngs=nnx.Rngs(0))))
    autoencoder = nnx.merge(graph, random_like(nnx.to_pure_dict(abstract)))
    path = tmp_path / "model.safetensors"
    export_params(path, config, 7, params, autoencoder)
    result = load_exported(path)
    assert_same(result.params, params)
    assert result.autoencoder.config == SIZES
    assert_same(weights_of(result.autoencoder), weights_of(autoencoder))
    assert "autoencoder.decoder.conv_in.kernel" in read(path)[0]
    assert Pipeline(result.config, result.params, result.step, result.autoencoder).step == 7


def test_the_classes_of_the_masks_come_with_the_file(config, params, exported):
    _, metadata = read(exported)
    assert json.loads(metadata["config"])["data"]["classes"]["names"] == list(config.data.classes.names)
    assert read_config(exported) == load_exported(exported).config == config


def test_parameters_that_are_not_finite_are_neither_exported_nor_loaded(config, params, exported, tmp_path):
    kernel = params["layers"]["stacked"]["mixer"]["in_proj"]["kernel"]
    bad = jax.tree.map(lambda x: x.at[0, 0, 0].set(jnp.nan) if x is kernel else x, params)
    name = "layers.stacked.mixer.in_proj.kernel"
    with pytest.raises(InputError, match=rf"bad.safetensors is not written: the parameter {name} is not finite"):
        export_params(tmp_path / "bad.safetensors", config, 1, bad)
    assert not (tmp_path / "bad.safetensors").exists()
    arrays, metadata = read(exported)
    arrays[name][0, 0, 0] = np.inf
    write(exported, arrays, metadata | {"crc32": flat_trees.crc32(arrays)})
    with pytest.raises(InputError, match=rf"model.safetensors cannot be used: the parameter {name} is not finite"):
        load_exported(exported)


def test_denoiser_of_latents_without_its_autoencoder_is_refused(tmp_path):
    config = tiny_latent_config(Path("data"))
    export_params(tmp_path / "model.safetensors", config, 7, random_params(config))
    with pytest.raises(InputError, match=r"model.safetensors holds a denoiser of latents without its autoencoder"):
        load_exported(tmp_path / "model.safetensors")


def test_export_to_and_from_a_bucket(config, params, monkeypatch):
    path = make_bucket(monkeypatch) / "model.safetensors"
    export_params(path, config, 5, params)
    assert_same(load_exported(str(path)).params, params)


def test_files_that_are_not_safetensors_are_named(exported, tmp_path):
    size = exported.stat().st_size
    for length in (0, 5, 1000, size - 1):
        os.truncate(exported, length)
        with pytest.raises(InputError, match=r"model.safetensors cannot be read as safetensors"):
            load_exported(exported)
    (tmp_path / "notes.txt").write_text("no arrays, but long enough for a header")
    with pytest.raises(InputError, match="cannot be read as safetensors"):
        load_exported(tmp_path / "notes.txt")
    with pytest.raises(InputError, match="is a folder; name a file"):
        load_exported(tmp_path)
    with pytest.raises(InputError, match=r"There is no file .*missing"):
        load_exported(tmp_path / "missing")


def test_flipped_bit_is_noticed(exported):
    content = bytearray(exported.read_bytes())
    content[-100] ^= 1
    exported.write_bytes(content)
    with pytest.raises(InputError, match="differs from what was exported"):
        load_exported(exported)


def write(path: Path, arrays: dict[str, np.ndarray], metadata: dict[str, str] | None) -> None:
    safetensors.numpy.save_file(arrays, path, metadata)


def test_files_of_other_programs_and_versions_are_named(exported):
    arrays, metadata = read(exported)
    for changed, message in (
        (None, "was not written by the command `export`"),
        ({"format": "pt"}, "was not written by the command `export`"),
        (metadata | {"version": "1"}, "is a file of version 1, .* reads version 2; use the release that exported it"),
        (metadata | {"version": "3"}, "is a file of version 3, .* reads version 2"),
        (metadata | {"config": "{"}, "configuration in .* is not a configuration"),
    ):
        write(exported, arrays, changed)
        for read_file in (load_exported, read_config):
            with pytest.raises(InputError, match=message) as error:
                read_file(exported)
            assert "\n" not in str(error.value)


def test_arrays_of_another_configuration_are_named(config, exported):
    arrays, metadata = read(exported)
    name = "layers.stacked.mixer.in_proj.kernel"
    for changed, line in (
        ({name: arrays[name][..., :4]}, "the file has float32[1, 16, 4], its configuration float32[1, 16, 64]"),
        ({name: arrays[name].astype(np.float16)}, "the file has float16"),
        ({"extra": np.zeros(3, np.float32)}, "extra: the file has float32[3], its configuration nothing"),
    ):
        write(exported, arrays | changed, metadata)
        with pytest.raises(InputError, match="other arrays than its configuration describes") as error:
            load_exported(exported)
        assert line in str(error.value)
    deeper = dataclasses.replace(config, model=dataclasses.replace(config.model, depth=2))
    write(exported, arrays, metadata | {"config": config_files.to_json(deeper)})
    with pytest.raises(InputError, match=r"stacked\.\S+: the file has float32\[1, .*, its configuration float32\[2, "):
        load_exported(exported)


def test_place_that_cannot_be_written_is_named(config, params, tmp_path):
    (tmp_path / "file").write_text("x")
    for path in (tmp_path, tmp_path / "file" / "model.safetensors"):
        with pytest.raises(InputError, match=r"cannot be written .*name another file"):
            export_params(path, config, 1, params)


def test_parameters_of_another_type_are_refused(config, params, tmp_path):
    path = tmp_path / "model.safetensors"
    export_params(path, config, 1, jax.tree.map(lambda x: x.astype(jnp.bfloat16), params))
    with pytest.raises(InputError, match=r"the file has bfloat16\[.*, its configuration float32\["):
        load_exported(path)


def test_a_face_parser_travels_with_the_model(tmp_path):
    config = tiny_config(tmp_path)
    parser = FaceParser(make_graph(8, 19), parser_params(jax.random.key(1), 8, 19), CELEBAMASK_HQ, 16)
    export_params(tmp_path / "a.safetensors", config, 4, init_params(config, jax.random.key(0)), parser=parser)
    loaded = load_exported(tmp_path / "a.safetensors").parser
    assert loaded is not None
    assert (loaded.classes, loaded.image_size) == (CELEBAMASK_HQ, 16)
    jax.tree.map(np.testing.assert_array_equal, loaded.params, parser.params)
    export_params(tmp_path / "b.safetensors", config, 4, init_params(config, jax.random.key(0)))
    assert load_exported(tmp_path / "b.safetensors").parser is None
