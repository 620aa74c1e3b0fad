"""Reading with a cache is one forward pass: token by token, in pieces, ragged, forked, on one device and on eight."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from irope_jax.attention.mask import Chunked, Global, Sliding, allowed
from irope_jax.core.config import ConfigError
from irope_jax.core.numerics import assert_close, tree_bytes
from irope_jax.core.types import TokenInfo
from irope_jax.model.cache import (
    CacheSpec,
    cache_bytes,
    empty_cache,
    for_documents_of,
    fork,
    new_cache,
    row_bytes,
)
from irope_jax.model.config import LayerSpec, ModelConfig, irope_layers
from irope_jax.model.cost import abstract_params
from irope_jax.model.decoder import cached_hidden_states, hidden_states, init_params
from irope_jax.model.feed_forward import SwiGLU
from irope_jax.position.encoding import ALiBi, NoPE, RoPE
from irope_jax.position.scaling import NTK, DynamicNTK, Llama3, LongRoPE, YaRN
from irope_jax.position.temperature import LogFloor, SSMax
from irope_jax.sharding.mesh import MeshConfig, make_mesh
from irope_jax.sharding.rules import tree_shardings

FFN = SwiGLU(16)
LENGTHS = (29, 17, 23, 29)
T = max(LENGTHS)
LLAMA3 = Llama3(16.0, 8, 1.0, 1.0)
LONG = LongRoPE(8, 4.0, (1.0, 1.5, 2.5, 4.0), first_tokens=2)


def layer(position, mask, **more):
    return LayerSpec(position, mask, FFN, **more)


def model(*pattern, layers=None, **changes) -> ModelConfig:
    base = dict(vocab_size=32, d_model=16, num_heads=4, num_kv_heads=2, head_dim=8, init_std=0.3)
    return ModelConfig(**base | dict(num_layers=layers or len(pattern), pattern=pattern) | changes)


IROPE = irope_layers(8, FFN, temperature=LogFloor(8, 0.5), qk_norm="rms", interval=2)
MODELS = {
    "global alibi": model(layer(ALiBi(), Global())),
    "global yarn": model(layer(RoPE(scaling=YaRN(4.0, 8)), Global(), temperature=SSMax(16), qk_norm="learned")),
    "chunked llama3": model(layer(RoPE(scaling=LLAMA3), Chunked(8, shift=3))),
    "sliding ntk": model(layer(RoPE(scaling=NTK(4.0)), Sliding(6))),
    "dynamic": for_documents_of(model(layer(RoPE(scaling=DynamicNTK(2.0, 8, step=4)), Global())), T),
    "longrope": for_documents_of(model(layer(RoPE(scaling=LONG), Global())), T),
    "irope": model(*IROPE, layers=4),
    "all kinds": model(*IROPE, layer(RoPE(), Sliding(5)), layer(NoPE(), Global()), block="parallel"),
}
EIGHT = MeshConfig(data=1, context=4, tensor=2)


def params_of(config):
    return nn.meta.unbox(jax.jit(lambda: init_params(config, jax.random.key(0)))())


def tokens_of(batch=len(LENGTHS), length=T):
    return jnp.asarray(np.random.default_rng(0).integers(0, 32, (batch, length)), jnp.int32)


def real_of(lengths=LENGTHS, length=T):
    return np.arange(length) < np.asarray(lengths)[:, None]


def whole(config, params, tokens, real):
    """Logits of one forward pass."""
    rows = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    info = TokenInfo(jnp.where(real, rows, 0), real.astype(jnp.int32), rows, first_row=0, document_multiple=0)

    @jax.jit
    def run(params):
        hidden, w = hidden_states(dataclasses.replace(config, attention="reference"), params, tokens, info)
        return hidden @ w

    return np.asarray(run(params))


def in_pieces(config, params, tokens, real, cache, cuts):
    """Logits of reading tokens piece by piece; pieces of one width are one scanned program."""

    @jax.jit
    def run(params, cache, tokens_nBT, real_nBT):
        def step(cache, piece):
            tokens, real = piece
            hidden, w, cache = cached_hidden_states(config, params, tokens, cache.next_info(real), cache)
            return cache, hidden @ w

        return jax.lax.scan(step, cache, (tokens_nBT, real_nBT))

    found, at = [], 0
    for width, count in cuts:
        take = lambda x: np.moveaxis(x[:, at : at + width * count].reshape(len(x), count, width), 1, 0)  # noqa: B023
        cache, logits = run(params, cache, take(np.asarray(tokens)), take(real))
        found.append(np.moveaxis(np.asarray(logits), 0, 1).reshape(len(tokens), width * count, -1))
        at += width * count
    assert at == tokens.shape[1]
    return np.concatenate(found, axis=1), cache


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("devices", [1, 8])
def test_token_by_token_is_one_forward_pass(name, devices):
    config, tokens, real = MODELS[name], tokens_of(), real_of()
    params = params_of(config)
    want = whole(config, params, tokens, real)
    mesh = make_mesh(EIGHT if devices == 8 else MeshConfig(), jax.devices()[:devices])
    with jax.set_mesh(mesh):
        params = jax.device_put(params, tree_shardings(abstract_params(config), mesh))
        cache = new_cache(config, CacheSpec(len(LENGTHS), 32, "float32"))
        found, cache = in_pieces(config, params, tokens, real, cache, [(1, T)])
    assert_close(found[real], want[real], rtol=0, atol=1e-4)
    assert cache.lengths.tolist() == list(LENGTHS)
