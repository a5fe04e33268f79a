"""Samplers as StableHLO: what the command writes runs with JAX alone and gives the faces of the pipeline."""

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

import sisma_jax
from sisma_jax.config import FlowConfig, Sampling
from sisma_jax.data.drawing import draw_face
from sisma_jax.errors import InputError
from sisma_jax.models.autoencoder import IdentityAutoencoder, KlAutoencoder, KlConfig
from sisma_jax.models.factory import init_params
from sisma_jax.pipeline import Pipeline
from sisma_jax.runs.stablehlo import export_sampler
from tests.command_line import command, refused
from tests.tiny import tiny_config, tiny_latent_config

DOCUMENT = Path(__file__).parents[2] / "docs/export.md"


def random_params(config):
    abstract = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.asarray(0.3 * rng.standard_normal(x.shape), x.dtype), abstract)


def load(path):
    return jax.export.deserialize(bytearray(path.read_bytes()))


def require_close(faces, wanted):
    """Differences of one in the last place of a colour are those of rounding."""
    difference = np.abs(np.asarray(faces).astype(int) - wanted.astype(int))
    assert difference.max() <= 2
    assert difference.mean() < 0.05


def test_the_file_of_the_command_runs_in_a_process_without_sisma_jax(finished, tmp_path, capsys):
    command(finished, "export", "--format", "stablehlo", "--out", tmp_path / "faces.stablehlo", "--sample.steps=3")
    assert "3 steps" in capsys.readouterr().out
    mask = draw_face(np.random.default_rng(0), 16)[1]
    Image.fromarray(mask).save(tmp_path / "mask.png")
    [program] = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    blocked = f"import sys\nsys.modules.update(dict.fromkeys(['sisma_jax', 'flax', 'kernels']))\n{program}"
    done = subprocess.run([sys.executable, "-c", blocked], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    faces = np.stack([np.asarray(Image.open(tmp_path / f"face_{i}.png")) for i in range(4)])
    keys = jax.random.split(jax.random.key(0), 4)
    require_close(faces, sisma_jax.load(finished[1])(np.stack([mask] * 4), key=keys, steps=3))
    assert load(tmp_path / "faces.stablehlo").platforms == ("cpu", "tpu", "cuda")
    assert "exists" in refused(
        capsys, finished, "export", "--format", "stablehlo", "--out", tmp_path / "faces.stablehlo"
    )


@pytest.mark.parametrize(("objective", "is_latent"), [("flow_matching", False), ("mean_flow", True)])
def test_batches_of_any_size_have_the_faces_of_the_pipeline(tmp_path, objective, is_latent):
    config = (tiny_latent_config if is_latent else tiny_config)(tmp_path)
    config = dataclasses.replace(
        config, flow=FlowConfig(prediction="data", objective=objective), sample=Sampling(steps=2)
    )
    autoencoder = IdentityAutoencoder()
    if is_latent:
        autoencoder = KlAutoencoder(
            KlConfig(block_channels=(4, 8), layers_per_block=1, norm_groups=4), rngs=nnx.Rngs(0)
        )
    params, path = random_params(config), tmp_path / "folder/faces.stablehlo"
    export_sampler(path, config, params, autoencoder, ["cpu"])
    pipe, sampler = Pipeline(config, params, 1, autoencoder), load(path)
    for count in (1, 3):
        masks = np.stack([draw_face(np.random.default_rng(i), 16)[1] for i in range(count)])
        keys = jax.random.split(jax.random.key(count), count)
        faces = sampler.call(jax.random.key_data(keys), masks)
        assert faces.dtype == jnp.uint8
        require_close(faces, pipe(masks, key=keys))


def test_what_cannot_be_exported_is_refused(finished, tmp_path, capsys):
    out = ("--out", tmp_path / "faces.safetensors")
    assert "must end in .stablehlo" in refused(capsys, finished, "export", "--format", "stablehlo", *out)
    config = tiny_config(tmp_path)
    kernel = dataclasses.replace(config, model=dataclasses.replace(config.model, scan_implementation="pallas_gpu"))
    with pytest.raises(InputError, match="pallas_gpu has no batches of any size"):
        export_sampler(tmp_path / "faces.stablehlo", kernel, {}, IdentityAutoencoder())
    assert not (tmp_path / "faces.stablehlo").exists()
