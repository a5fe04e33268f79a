"""The KL autoencoder against diffusers' (see `golden/make_kl_autoencoder.py`), its files, and decoding in tiles."""

import dataclasses
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx
from flax.traverse_util import flatten_dict

from sisma_jax.errors import InputError
from sisma_jax.models import autoencoder as autoencoders
from sisma_jax.models import kl_weights
from sisma_jax.models.autoencoder import KlAutoencoder, KlConfig, from_uint8, to_uint8
from tests.models.test_denoiser import random_params

GOLDEN = Path(__file__).parent / "golden" / "kl_autoencoder.npz"


@functools.cache
def golden() -> dict[str, np.ndarray]:
    with np.load(GOLDEN) as file:
        return dict(file)


def weights_of(model: str) -> dict[str, np.ndarray]:
    prefix = f"{model}/weights/"
    return {name.removeprefix(prefix): x for name, x in golden().items() if name.startswith(prefix)}


def save(folder: Path, model: str, weights: dict[str, np.ndarray] | None = None) -> Path:
    """Writes a folder as diffusers does."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(str(golden()[f"{model}/config"]))
    contents = weights_of(model) if weights is None else weights
    safetensors.numpy.save_file(contents, folder / "diffusion_pytorch_model.safetensors")
    return folder


def test_bytes_and_floats_are_inverse():
    image = jnp.arange(256, dtype=jnp.uint8).reshape(1, 16, 16, 1).repeat(3, axis=-1)
    assert float(from_uint8(image).min()) == -1
    assert float(from_uint8(image).max()) == 1
    np.testing.assert_array_equal(to_uint8(from_uint8(image)), image)
    np.testing.assert_array_equal(to_uint8(jnp.full((1, 1, 1, 3), 1.7)), 255)


def jitted(method):
    """A bound method under `jax.jit`: op by op, all would be compiled one by one."""
    return jax.jit(lambda *arguments: method(*arguments))


def channels_last(x: np.ndarray) -> np.ndarray:
    return x.transpose(0, 2, 3, 1)


@pytest.mark.parametrize("model", ["sd", "sd3"])
def test_moments_and_images_are_those_of_diffusers(model, tmp_path):
    autoencoder = kl_weights.load(save(tmp_path / model, model))
    want = {name: channels_last(golden()[f"{model}/{name}"]) for name in ("mean", "log_variance", "decoded")}
    graph, params = nnx.split(autoencoder)

    @jax.jit
    def run(params, image, latent):
        model = nnx.merge(graph, params)
        return *model.moments(image), model.decode(latent)

    image, latent = (channels_last(golden()[f"{model}/{name}"]) for name in ("image", "latent"))
    for got, name in zip(run(params, image, latent), want, strict=True):
        np.testing.assert_allclose(got, want[name], rtol=1e-4, atol=1e-4, err_msg=name)


def test_names_and_shapes_of_stable_diffusions_own_size():
    shapes = json.loads(str(golden()["shapes"]))
    params = nnx.to_pure_dict(nnx.split(nnx.eval_shape(lambda: KlAutoencoder(KlConfig(), rngs=nnx.Rngs(0))))[1])
    weights = {name: np.broadcast_to(np.float32(0), shape) for name, shape in shapes.items()}
    # Shapes alone: no array of this size is made.
    leaves = jax.tree_util.tree_leaves_with_path(params)
    names = {kl_weights._find(weights, kl_weights._name(path)): x.shape for path, x in leaves}
    assert set(names) == set(shapes)
    for name, shape in names.items():
        torch_shape = tuple(shapes[name])
        assert shape == tuple(torch_shape[i] for i in ((2, 3, 1, 0) if len(shape) == 4 else range(len(shape))[::-1]))
    assert sum(np.prod(shape) for shape in shapes.values()) == 83_653_863


def test_latents_are_scaled_and_shifted_both_ways(tmp_path):
    autoencoder = kl_weights.load(save(tmp_path, "sd3"))
    assert (autoencoder.config.scale, autoencoder.config.shift) == (1.5305, 0.0609)
    image = jnp.asarray(channels_last(golden()["sd3/image"]))
    mean, log_variance = jitted(autoencoder.moments)(image)
    encode = jitted(autoencoder.encode)
    np.testing.assert_allclose(encode(image), 1.5305 * (mean - 0.0609), rtol=1e-5, atol=1e-6)
    drawn = np.stack([encode(image, key) for key in jax.random.split(jax.random.key(0), 16)])
    noise = (drawn / 1.5305 + 0.0609 - np.asarray(mean)) / np.exp(log_variance / 2)
    assert abs(noise.mean()) < 0.02
    assert abs(noise.std() - 1) < 0.02


def test_files_of_every_kind_are_read(tmp_path):
    want = jax.tree.leaves(nnx.split(kl_weights.load(save(tmp_path / "folder", "sd")))[1])

    def assert_same(path):
        got = nnx.split(kl_weights.load(path))[1]
        jax.tree.map(np.testing.assert_array_equal, jax.tree.leaves(got), want)

    assert_same(tmp_path / "folder" / kl_weights.WEIGHTS_NAME)
    old = {}
    for name, x in weights_of("sd").items():
        for new, before in kl_weights._OLD_NAMES.items():
            name = name.replace(f".{new}.", f".{before}.")
        # Some files have linear maps as 1x1 convolutions.
        old[name] = x[:, :, None, None] if ".query.weight" in name else x
    assert any(".proj_attn." in name for name in old)
    assert_same(save(tmp_path / "old", "sd", old))


def test_without_a_configuration_the_scale_is_stable_diffusions(tmp_path):
    save(tmp_path, "sd")
    (tmp_path / "config.json").write_text('{"norm_num_groups": 4}')
    assert kl_weights.load(tmp_path).config.scale == 0.18215
    (tmp_path / "config.json").unlink()
    with pytest.raises(InputError, match="has 8 channels, which 32 groups do not divide"):
        kl_weights.load(tmp_path)
    save(tmp_path, "sd3")
    (tmp_path / "config.json").unlink()
    with pytest.raises(InputError, match=r"config\.json is missing.*only it gives the scale of latents of 16"):
        kl_weights.load(tmp_path)


def test_what_cannot_be_loaded_is_named_with_the_cure(tmp_path):
    with pytest.raises(InputError, match=r"absent do not exist.*sd-vae-ft-mse"):
        kl_weights.load(tmp_path / "absent")
    folder = save(tmp_path / "vae", "sd")
    file = folder / kl_weights.WEIGHTS_NAME
    whole = file.read_bytes()
    for length in (0, 5, len(whole) // 2):
        file.write_bytes(whole[:length])
        with pytest.raises(InputError, match=r"cannot be read as safetensors.*download it again"):
            kl_weights.load(folder)
    weights = weights_of("sd")
    name = "decoder.mid_block.attentions.0.to_v.weight"
    save(folder, "sd", {key: x for key, x in weights.items() if key != name})
    with pytest.raises(InputError, match=f"has no weight '{name}'"):
        kl_weights.load(folder)
    save(folder, "sd", weights | {name: np.zeros((3, 3), np.float16)})
    with pytest.raises(InputError, match=rf"'{name}' is \(3, 3\), the model's is \(12, 12\)"):
        kl_weights.load(folder)
    save(folder, "sd", weights | {"loss.weight": np.zeros(3, np.float16)})
    with pytest.raises(InputError, match=r"weights that the model does not: loss\.weight"):
        kl_weights.load(folder)
    save(folder, "sd", {"weight": np.zeros(3, np.float16)})
    with pytest.raises(InputError, match="not hold a KL autoencoder"):
        kl_weights.load(folder)
    save(folder, "sd")
    (folder / "config.json").write_text("{")
    with pytest.raises(InputError, match="is not JSON"):
        kl_weights.load(folder)
    (folder / "config.json").write_text('{"act_fn": "relu"}')
    with pytest.raises(InputError, match="act_fn = 'relu', which is not implemented"):
        kl_weights.load(folder)


@pytest.mark.parametrize(
    ("field", "values", "wanted"),
    [
        ("scaling_factor", ("null", '"0.2"', "0", "-1", "NaN", "Infinity", "true", "[1]"), "a positive number"),
        ("norm_num_groups", ("null", '"4"', "0", "-4", "4.0", "true"), "a positive integer"),
        ("shift_factor", ('"0"', "NaN", "false", "[0]"), "a number or null"),
    ],
)
def test_a_value_of_the_configuration_that_makes_no_sense_is_named(field, values, wanted, tmp_path):
    file = save(tmp_path, "sd") / "config.json"
    good = json.loads(file.read_text())
    for value in values:
        file.write_text(json.dumps(good | {field: "VALUE"}).replace('"VALUE"', value))
        with pytest.raises(InputError, match=rf"config\.json has {field} = .*, want {wanted}"):
            kl_weights.load(tmp_path)
    for text in ("[]", "1", "null"):
        file.write_text(text)
        with pytest.raises(InputError, match=r"config\.json is not a JSON object"):
            kl_weights.load(tmp_path)
    file.write_text(json.dumps(good | {"shift_factor": None}))
    assert kl_weights.load(tmp_path).config.shift == 0


TINY = KlConfig(block_channels=(8, 8), layers_per_block=1, norm_groups=4)


@functools.cache
def make_autoencoder() -> KlAutoencoder:
    graph, abstract = nnx.split(nnx.eval_shape(lambda: KlAutoencoder(TINY, rngs=nnx.Rngs(0))))
    return nnx.merge(graph, random_params(abstract))


def test_sizes_that_cannot_be_halved_are_refused():
    with pytest.raises(ValueError, match=r"image is \(9, 8\), want multiples of 2"):
        make_autoencoder().moments(jnp.zeros((1, 9, 8, 3)))


def test_tiles_of_a_decoder_without_reach_are_the_whole():
    """Where nothing looks beyond its own position, pieces and whole are equal: only the joining is left."""
    autoencoder = nnx.clone(make_autoencoder())
    autoencoder._decode = lambda latent: latent[..., :3].repeat(2, axis=1).repeat(2, axis=2)
    latent = jax.random.normal(jax.random.key(0), (2, 13, 21, 4))
    for tile, overlap in ((5, 2), (8, 0), (13, 12), (16, 4)):
        tiled = autoencoder.decode_in_tiles(latent, tile, overlap)
        np.testing.assert_allclose(tiled, autoencoder.decode(latent), rtol=1e-5, atol=1e-6)


def test_tiles_pass_smoothly_into_each_other_and_small_latents_are_whole():
    autoencoder = make_autoencoder()
    latent = jax.random.normal(jax.random.key(0), (1, 24, 10, 4))
    whole = jitted(autoencoder.decode)(latent)
    np.testing.assert_array_equal(jitted(lambda x: autoencoder.decode_in_tiles(x, 24, 4))(latent), whole)
    tiled = jitted(lambda x: autoencoder.decode_in_tiles(x, 12, 6))(latent)
    assert tiled.shape == whole.shape

    # The largest step from row to row is not larger than that of the whole.
    def steps(image):
        return np.abs(np.diff(image, axis=1)).max()

    assert steps(tiled) < 1.2 * steps(whole)
    with pytest.raises(ValueError, match=r"overlap must be in 0\.\.7"):
        autoencoder.decode_in_tiles(latent, 8, 8)


def test_large_latents_are_decoded_in_tiles(monkeypatch):
    autoencoder = make_autoencoder()
    latent = jax.random.normal(jax.random.key(0), (1, 24, 10, 4))
    whole, tiled = (
        jitted(decode)(latent) for decode in (autoencoder.decode, lambda x: autoencoder.decode_in_tiles(x, 12, 3))
    )
    monkeypatch.setattr(autoencoders, "DECODE_TILE", 24)
    np.testing.assert_array_equal(jitted(lambda x: autoencoder.decode(x))(latent), whole)
    monkeypatch.setattr(autoencoders, "DECODE_TILE", 12)
    np.testing.assert_array_equal(jitted(lambda x: autoencoder.decode(x))(latent), tiled)
    assert (tiled != whole).any()


def test_an_autoencoder_can_be_trained():
    graph, params = nnx.split(make_autoencoder())
    image = jax.random.uniform(jax.random.key(0), (1, 8, 8, 3), minval=-1.0)

    @jax.jit
    def gradient(params):
        def loss(params):
            model = nnx.merge(graph, params)
            return ((model.decode(model.encode(image, jax.random.key(1))) - image) ** 2).mean()

        return jax.grad(loss)(params)

    largest = {key: np.abs(x).max() for key, x in flatten_dict(nnx.to_pure_dict(gradient(params))).items()}
    # A key's bias adds the same to all logits of a query, a bias before a norm of the same groups as channels nothing.
    assert all("to_k" in key for key, value in largest.items() if value < 1e-8), largest


def test_the_configuration_knows_its_downsampling():
    assert KlConfig().downsampling == 8
    assert dataclasses.replace(KlConfig(), block_channels=(8, 8)).downsampling == 2
