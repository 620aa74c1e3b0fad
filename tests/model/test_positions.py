"""Every position spec, temperature and embedding inside the model: packing, meshes, what is refused."""

import dataclasses
from functools import partial
from itertools import cycle

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from irope_jax.attention.mask import Chunked, Global, Sliding
from irope_jax.context.layout import ContextLayout
from irope_jax.core.config import ConfigError, from_dict, to_dict
from irope_jax.core.numerics import assert_close
from irope_jax.core.types import Batch, TokenInfo
from irope_jax.model.config import LayerSpec, ModelConfig, draw_layers
from irope_jax.model.decoder import hidden_states, init_params, logits
from irope_jax.model.feed_forward import SwiGLU
from irope_jax.position.absolute import Learned, NoEmbedding, Sinusoidal
from irope_jax.position.encoding import ALiBi, NoPE, RoPE, XPos
from irope_jax.position.extension import DualChunk, ReRoPE, SelfExtend
from irope_jax.position.rope import Turns
from irope_jax.position.scaling import NTK, DynamicNTK, LongRoPE, YaRN
from irope_jax.position.temperature import LogFloor, LogN, SSMax
from irope_jax.sharding.mesh import MeshConfig, make_mesh
from irope_jax.train.step import loss_sums

FFN = SwiGLU(16)
LONG = LongRoPE(8, 2.0, (1.0, 1.2, 1.5, 2.0), first_tokens=3)
POSITIONS = [
    RoPE(scaling=YaRN(2.0, 8)),
    RoPE(scaling=DynamicNTK(2.0, 8, step=1)),
    RoPE(scaling=LONG),
    RoPE(fraction=0.5),
    ALiBi(),
    XPos(),
    SelfExtend(window=4, group=2),
    ReRoPE(window=4),
    DualChunk(chunk=4, farthest=6),
]
TEMPERATURES = [LogN(8), SSMax(8), LogFloor(4, 0.5, by="length")]
PAIRS = list(zip(POSITIONS, cycle(TEMPERATURES)))  # each temperature with frequencies, with distances and in parts


def model(*pattern, **changes) -> ModelConfig:
    base = dict(vocab_size=32, d_model=16, num_heads=4, num_kv_heads=2, head_dim=8, init_std=0.3, num_layers=2)
    return ModelConfig(**base | dict(pattern=pattern, attention="reference") | changes)


def params_of(config):
    return nn.meta.unbox(jax.jit(lambda: init_params(config, jax.random.key(0)))())


logits = jax.jit(logits, static_argnums=0)


def tokens_of(batch=1, length=24):
    return jax.random.randint(jax.random.key(1), (batch, length), 0, 32)


def two_documents(first, second, total):
    positions = np.concatenate([np.arange(first), np.arange(second), np.zeros(total - first - second, int)])
    segments = np.concatenate([np.full(first, 1), np.full(second, 2), np.zeros(total - first - second, int)])
    row = lambda x: jnp.asarray(x, jnp.int32)[None]
    return TokenInfo(row(positions), row(segments), row(np.arange(total)), first_row=0)


@pytest.mark.parametrize(("position", "temperature"), PAIRS, ids=lambda x: getattr(x, "scaling", x).kind)
def test_a_packed_document_gets_the_logits_it_gets_alone(position, temperature):
    config = model(LayerSpec(position, Global(), FFN, temperature=temperature))
    assert from_dict(ModelConfig, to_dict(config)) == config
    params, tokens = params_of(config), tokens_of()
    together = logits(config, params, tokens, two_documents(7, 12, 24))
    for start, length in ((0, 7), (7, 12)):
        alone = logits(config, params, tokens[:, start : start + length], TokenInfo.single(1, length))
        assert_close(together[:, start : start + length], alone, what=f"document at {start}")


@pytest.mark.parametrize("mask", [Chunked(4), Sliding(5)], ids=lambda m: m.kind)
@pytest.mark.parametrize("position", [RoPE(scaling=LONG), XPos(), ALiBi()], ids=lambda p: p.kind)
def test_local_layers_with_every_position(mask, position):
    """Chunk-relative positions where only distances matter, positions in the document where they do not."""
    config = model(LayerSpec(position, mask, FFN))
    params, tokens = params_of(config), tokens_of()
    ours = logits(config, params, tokens, TokenInfo.single(1, 24))
    short = logits(config, params, tokens[:, :9], TokenInfo.single(1, 9))
    if isinstance(position, RoPE):  # 9 and 24 tokens are both long: the same factors
        assert_close(ours[:, :9], short, what="a prefix")
    # the same attention by a global mask over documents that are the chunks
    if mask == Chunked(4) and not isinstance(position, RoPE):
        rows = jnp.arange(24, dtype=jnp.int32)[None]
        cut = TokenInfo(rows % 4, rows // 4 + 1, rows, first_row=0)
        alike = model(LayerSpec(position, Global(), FFN))
        assert_close(ours, logits(alike, params, tokens, cut), what="chunks as documents")


@pytest.mark.parametrize("position", [ALiBi(), RoPE(scaling=DynamicNTK(2.0, 8, step=4)), RoPE(scaling=LONG)], ids=str)
def test_across_devices_as_on_one(position):
    """ALiBi through the ring, and frequencies by the length of documents that are cut over devices."""
    config = model(LayerSpec(position, Global(), FFN, temperature=SSMax(16)))
    params, tokens = params_of(config), tokens_of(2, 32)
    info = jax.tree.map(lambda x: jnp.broadcast_to(x, (2, 32)), two_documents(9, 20, 32))
    layout = ContextLayout("zigzag", 4)
    batch = Batch(tokens, tokens, jnp.ones((2, 32), jnp.float32), info)

    @partial(jax.jit, static_argnums=0)
    @partial(jax.value_and_grad, argnums=1)
    def loss(config, p, b):
        return (hidden_states(config, p, b.tokens, b.info)[0].astype(jnp.float32) ** 3).mean()

    single = loss(config, params, batch)
    with jax.set_mesh(make_mesh(MeshConfig(data=2, context=4))):
        ours = loss(dataclasses.replace(config, attention="blockwise"), params, layout.place(batch))
    assert_close(ours, single, what="loss and gradients", atol=2e-5)


@pytest.mark.parametrize("embedding", [Sinusoidal(), Learned(24)], ids=lambda e: e.kind)
def test_position_embeddings_tell_places_apart(embedding):
    """One token repeated under NoPE: every place looks alike, unless something is added to it."""
    config = model(LayerSpec(NoPE(), Global(), FFN), position_embedding=embedding)
    plain = dataclasses.replace(config, position_embedding=NoEmbedding())
    params, tokens = params_of(config), jnp.full((1, 24), 3)
    spread = lambda c: float(logits(c, params, tokens, TokenInfo.single(1, 24)).std(axis=1).max())
    assert spread(plain) < 1e-5 < 1e-2 < spread(config)
    packed = logits(config, params, tokens, two_documents(7, 7, 24))
    assert_close(packed[:, :7], packed[:, 7:14], what="positions restart in each document")
    assert "position embedding" in draw_layers(config)


def test_a_row_longer_than_the_learned_table_is_refused():
    config = model(LayerSpec(NoPE(), Global(), FFN), position_embedding=Learned(8))
    with pytest.raises(ConfigError, match=r"position_embedding.size=8.*9 positions"):
        logits(config, params_of(config), tokens_of(1, 9), TokenInfo.single(1, 9))


def test_temperatures_for_evaluation_are_left_out_of_training():
    spec = LayerSpec(NoPE(), Global(), FFN, temperature=LogFloor(2, 1.0, when="eval"))
    config, plain = model(spec), model(dataclasses.replace(spec, temperature=LogFloor(2, 0.0)))
    params, tokens = params_of(config), tokens_of()
    info = TokenInfo.single(1, 24)
    batch = Batch(tokens, tokens, jnp.ones((1, 24), jnp.float32), info)
    loss = jax.jit(lambda config: loss_sums(config, params, batch, 0.0)[0], static_argnums=0)
    assert_close(loss(config), loss(plain), what="training")
    read = [logits(c, params, tokens, info) for c in (config, plain)]
    assert np.abs(read[0] - read[1]).max() > 1e-2


def test_frequencies_as_arguments_are_those_of_the_config():
    scaled = model(LayerSpec(RoPE(scaling=NTK(4.0)), Global(), FFN))
    plain = model(LayerSpec(RoPE(), Global(), FFN))
    params, tokens, info = params_of(plain), tokens_of(), TokenInfo.single(1, 24)
    turns = (Turns.of(NTK(4.0).frequencies(8, 10000.0)),)
    given = jax.jit(lambda turns: hidden_states(plain, params, tokens, info, turns)[0])(turns)
    assert_close(given, hidden_states(scaled, params, tokens, info)[0], what="hidden states")


def test_impossible_layers_name_the_field_and_the_fix():
    yarn = YaRN(4.0, 8)
    for make, message in (
        (lambda: LayerSpec(ReRoPE(4), Chunked(4), FFN), r"mask=.*rerope.*global"),
        (
            lambda: LayerSpec(RoPE(scaling=yarn, fraction=0.5, part="prefix"), Global(), FFN, qk_norm="rms"),
            r"qk_norm='rms'.*prefix.*none",
        ),
        (lambda: model(LayerSpec(XPos(), Global(), FFN), head_dim=7), r"head_dim=7.*even"),
        (
            lambda: model(LayerSpec(RoPE(scaling=LongRoPE(8, 2.0, (1.0, 2.0))), Global(), FFN)),
            r"pattern.0.position.scaling.long_factor=\(1.0, 2.0\): has 2 factors.*4 pairs",
        ),
        (
            lambda: model(LayerSpec(NoPE(), Global(), FFN), d_model=15, position_embedding=Sinusoidal()),
            r"d_model=15.*even",
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            make()
    with jax.set_mesh(make_mesh(MeshConfig(data=4, context=2))):
        config = model(LayerSpec(ReRoPE(4), Global(), FFN))
        params = params_of(config)
        with pytest.raises(ConfigError, match=r"mesh.context=2.*whole sequences"):
            logits(config, params, tokens_of(4, 8), TokenInfo.single(4, 8))
