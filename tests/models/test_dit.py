"""The attention baseline: SISMA's denoiser with other mixers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sisma_jax.config import Config, ModelConfig
from sisma_jax.errors import InputError
from sisma_jax.models import dit
from sisma_jax.models.condition import Condition
from sisma_jax.models.dit import CrossAttention, SelfAttention
from sisma_jax.models.dit import attention as attention_in_blocks
from sisma_jax.models.factory import init_params, make_graph

TINY = ModelConfig(backbone="dit", depth=2, d_model=16, patch_size=2, mlp_ratio=1.0, d_label=8)


def attention(q, k, v):
    """softmax(q kᵀ / sqrt(d)) v of one head in float64."""
    weights = np.exp(q @ k.T / np.sqrt(q.shape[-1]))
    return weights / weights.sum(-1, keepdims=True) @ v


def test_attention_is_the_formula(monkeypatch):
    monkeypatch.setattr(dit, "HEAD_CHANNELS", 8)
    module = CrossAttention(16, dtype=jnp.dtype("float32"), rngs=nnx.Rngs(0))
    x, context = jax.random.normal(jax.random.key(0), (2, 1, 3, 4, 16))
    computed = module(x, module.read(Condition(context), ()), ())
    q = np.asarray(module.query_proj(x), np.float64).reshape(12, 16)
    k, v = np.split(np.asarray(module.key_value_proj(context), np.float64).reshape(12, 32), 2, axis=-1)
    heads = [attention(q[:, h], k[:, h], v[:, h]) for h in (slice(0, 8), slice(8, 16))]
    expected = np.concatenate(heads, -1) @ np.asarray(module.out_proj.kernel[...], np.float64)
    np.testing.assert_allclose(computed.reshape(12, 16), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("length", [1, 255, 256, 257, 700])
def test_attention_in_blocks_of_queries_is_the_attention_of_all(length):
    q, k, v = jax.random.normal(jax.random.key(0), (3, 2, length, 2, 8))

    def run(attend):
        y, pullback = jax.vjp(attend, q, k, v)
        return y, *pullback(jnp.cos(y))

    for got, want in zip(
        jax.jit(run, static_argnums=0)(attention_in_blocks), run(jax.nn.dot_product_attention), strict=False
    ):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.optimized
def test_no_array_holds_the_logits_of_all_queries():
    heads = jax.ShapeDtypeStruct((1, 4096, 2, 8), jnp.float32)

    def loss(*heads):
        return attention_in_blocks(*heads).sum()

    memory = jax.jit(jax.grad(loss, (0, 1, 2))).lower(heads, heads, heads).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 4 * 2 * 4096 * 4096 / 2


def test_self_attention_sees_every_token():
    module = SelfAttention(16, dtype=jnp.dtype("float32"), rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (1, 4, 4, 16))
    moved = np.abs(module(x.at[0, 3, 3].add(1.0), None, ()) - module(x, None, ())).max(-1)[0]
    assert moved.min() > 1e-4


@pytest.mark.parametrize("conditioning", ["cross", "spade", "concat"])
@pytest.mark.parametrize("backbone", ["sisma", "dit"])
def test_every_way_of_conditioning_lets_the_mask_in(backbone, conditioning):
    config = Config(model=dataclasses.replace(TINY, backbone=backbone, d_state=4, mask_conditioning=conditioning))
    params = jax.jit(lambda: init_params(config, jax.random.key(0)))()
    # New gates and heads are zero: nothing would pass.
    keys = iter(jax.random.split(jax.random.key(1), 1000))
    params = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(next(keys), x.shape), params)

    @jax.jit
    def predict(mask):
        model = nnx.merge(make_graph(config), params)
        xt = jax.random.normal(jax.random.key(2), (1, 8, 8, 3))
        return model(xt, jnp.full((1,), 0.5), model.encode({"mask": mask}))

    mask = jnp.zeros((1, 8, 8), jnp.uint8)
    assert np.abs(predict(mask) - predict(mask + 1)).max() > 1e-3


def test_heads_must_divide_the_model():
    with pytest.raises(InputError, match=r"model\.d_model must be a multiple of 64, the channels .*, or less; got 96"):
        make_graph(Config(model=dataclasses.replace(TINY, d_model=96)))


@pytest.mark.parametrize(("d_model", "num_heads"), [(16, 1), (64, 1), (384, 6)])
def test_heads_have_64_channels_or_all_of_a_narrow_model(d_model, num_heads):
    module = nnx.eval_shape(lambda: SelfAttention(d_model, dtype=jnp.dtype("float32"), rngs=nnx.Rngs(0)))
    assert d_model // module.d_head == num_heads
