"""What a layer sees, by gradient; packing without leaks; scan = loop."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from irope_jax.attention.mask import Chunked, Global, Sliding
from irope_jax.core.config import ConfigError
from irope_jax.core.numerics import assert_close, assert_equal_trees
from irope_jax.core.types import TokenInfo
from irope_jax.model import decoder
from irope_jax.model.config import LayerSpec, ModelConfig, draw_layers, irope_layers
from irope_jax.model.decoder import Decoder, DecoderLayer, init_params, restack
from irope_jax.model.feed_forward import SwiGLU
from irope_jax.position.encoding import NoPE, RoPE
from irope_jax.position.temperature import LogFloor

FFN = SwiGLU(16)
logits = jax.jit(decoder.logits, static_argnums=0)
hidden_states = jax.jit(decoder.hidden_states, static_argnums=0)


def model(*pattern, layers=None, **changes) -> ModelConfig:
    base = dict(vocab_size=32, d_model=16, num_heads=4, num_kv_heads=2, head_dim=8, init_std=0.3)
    return ModelConfig(**base | dict(num_layers=layers or len(pattern), pattern=pattern) | changes)


def irope(**changes) -> ModelConfig:
    return model(*irope_layers(4, FFN, temperature=LogFloor(8, 0.5), qk_norm="rms"), **changes)


def params_of(config):
    return nn.meta.unbox(jax.jit(lambda: init_params(config, jax.random.key(0)))())


def packed(*lengths, total):
    """Documents of these lengths side by side, padding after them."""
    positions = np.concatenate([np.arange(n) for n in lengths] + [np.zeros(total - sum(lengths), int)])
    segments = np.concatenate(
        [np.full(n, i + 1) for i, n in enumerate(lengths)] + [np.zeros(total - sum(lengths), int)]
    )
    as_row = lambda x: jnp.asarray(x, jnp.int32)[None]
    return TokenInfo(as_row(positions), as_row(segments), as_row(np.arange(total)), first_row=0)


def seen(apply, x_BTD) -> str:
    """Which inputs each output depends on, as a drawing: `1` where some derivative is not exactly zero."""
    jacobian = jax.jit(jax.jacrev(apply))(x_BTD)[0, :, :, 0]  # [T, D, S, D]
    touched = np.abs(np.asarray(jacobian)).max(axis=(1, 3)) > 0
    return "\n".join("".join("01"[int(cell)] for cell in row) for row in touched)


SPECS = {
    "global": (LayerSpec(NoPE(), Global(), FFN), "1000000 1100000 1110000 1111000 1111100 1111110 1111111"),
    "sliding": (LayerSpec(RoPE(), Sliding(3), FFN), "1000000 1100000 1110000 0111000 0011100 0001110 0000111"),
    "chunked": (LayerSpec(RoPE(), Chunked(3), FFN), "1000000 1100000 1110000 0001000 0001100 0001110 0000001"),
    "shifted": (LayerSpec(RoPE(), Chunked(3, shift=1), FFN), "1000000 1100000 0010000 0011000 0011100 0000010 0000011"),
}


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("impl", ["reference", "blockwise"])
def test_a_layer_depends_on_exactly_what_its_mask_draws(name, impl):
    spec, picture = SPECS[name]
    config = model(spec, attention=impl)
    layer = DecoderLayer(config, spec)
    x = jax.random.normal(jax.random.key(1), (1, 7, 16))
    info = TokenInfo.single(1, 7)
    variables = nn.meta.unbox(jax.jit(layer.init)(jax.random.key(0), x, info))
    assert seen(lambda x: layer.apply(variables, x, info), x) == picture.replace(" ", "\n")


def test_the_stack_is_causal_and_its_global_layer_carries_what_is_far():
    config = irope()
    params = params_of(config)
    w_D = jax.random.normal(jax.random.key(2), (16,))
    info = TokenInfo.single(1, 12)

    def out(embedding):  # token t reads row t of the embedding, so a row's gradient is that token's
        return hidden_states(config, params | {"embedding": embedding}, jnp.arange(12)[None], info)[0][0] @ w_D

    touched = np.abs(np.asarray(jax.jit(jax.jacrev(out))(params["embedding"])))[:, :12].max(-1) > 0
    np.testing.assert_array_equal(touched, np.tril(np.ones((12, 12), bool)))


@pytest.mark.parametrize("mask", [Global(), Chunked(4), Sliding(5)], ids=lambda m: m.kind)
def test_a_packed_document_gets_the_logits_it_gets_alone(mask):
    position = NoPE() if mask == Global() else RoPE()
    config = model(LayerSpec(position, mask, FFN, temperature=LogFloor(4, 0.5)), layers=2)
    params = params_of(config)
    tokens = jax.random.randint(jax.random.key(1), (1, 24), 0, 32)
    info = packed(7, 10, total=24)
    together = logits(config, params, tokens, info)
    for start, length in ((0, 7), (7, 10)):
        alone = logits(config, params, tokens[:, start : start + length], TokenInfo.single(1, length))
        assert_close(together[:, start : start + length], alone, what=f"document at {start}")


def test_nothing_leaks_between_documents_or_from_padding():
    config = irope()
    params = params_of(config)
    tokens = np.asarray(jax.random.randint(jax.random.key(1), (1, 24), 0, 32))
    info = packed(7, 10, total=24)
    before = np.asarray(logits(config, params, tokens, info))
    changed = tokens.copy()
    changed[:, :7] = (changed[:, :7] + 5) % 32
    changed[:, 17:] = (changed[:, 17:] + 9) % 32
    after = np.asarray(logits(config, params, changed, info))
    np.testing.assert_array_equal(before[:, 7:17], after[:, 7:17])
    assert np.abs(before[:, :7] - after[:, :7]).max() > 0.1


def test_the_scan_over_the_period_is_a_loop_over_the_layers():
    config = irope(num_layers=8)
    assert len(config.period) == 4
    params = params_of(config)
    tokens = jax.random.randint(jax.random.key(1), (2, 10), 0, 32)
    info = TokenInfo.single(2, 10)
    x = params["embedding"][tokens]
    for i, spec in enumerate(config.layers):
        weights = jax.tree.map(lambda w, repeat=i // 4: w[repeat], params["periods"][f"layer_{i % 4}"])
        x = jax.jit(DecoderLayer(config, spec).apply)({"params": weights}, x, info)
    x = x * jax.lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + config.norm_eps)
    assert_close(hidden_states(config, params, tokens, info)[0], x, what="hidden states")


def test_restacked_parameters_stay_with_their_layer():
    """A model of one repeated layer, run as a period of 4: layer i must read the weights that were layer i's."""
    spec = LayerSpec(RoPE(), Global(), FFN)
    one, four = model(spec, layers=8), irope(num_layers=8)
    params = params_of(four)
    moved = restack(params, four, one)
    for i in range(8):
        left = jax.tree.map(lambda w, i=i: w[i // 4], params["periods"][f"layer_{i % 4}"])
        right = jax.tree.map(lambda w, i=i: w[i], moved["periods"]["layer_0"])
        assert_equal_trees(right, left, what=f"layer {i}")
    assert_equal_trees(restack(moved, one, four), params, what="there and back")
    with pytest.raises(ConfigError, match="8 layers"):
        restack(params, four, irope())


def test_parameters_do_not_depend_on_positions_masks_or_temperature():
    rope = dataclasses.replace(irope(), pattern=(LayerSpec(RoPE(theta=1e6), Global(), FFN),))
    shapes = lambda config: sorted(x.size for x in jax.tree.leaves(params_of(config)))
    assert sum(shapes(rope)) == sum(shapes(irope()))


def test_bfloat16_compute_stays_close_and_keeps_float32_parameters():
    from irope_jax.core.types import Precision

    config = irope()
    params = params_of(config)
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    tokens, info = jax.random.randint(jax.random.key(1), (2, 16), 0, 32), TokenInfo.single(2, 16)
    low = dataclasses.replace(config, precision=Precision(compute="bfloat16"))
    hidden, w_DV = hidden_states(low, params, tokens, info)
    assert hidden.dtype == w_DV.dtype == jnp.bfloat16
    exact, _ = hidden_states(config, params, tokens, info)
    assert np.abs(np.asarray(hidden, np.float32) - np.asarray(exact)).mean() < 0.02


def test_tied_and_untied_heads_have_the_matrices_they_say():
    assert "head" not in params_of(irope()) and params_of(irope(output_head="untied"))["head"].shape == (16, 32)
    tied = params_of(irope())
    w_DV = Decoder(irope()).apply({"params": tied}, method="head_matrix")
    np.testing.assert_array_equal(w_DV, tied["embedding"].T)


def test_the_drawing_names_every_layer_of_the_period():
    text = draw_layers(irope(num_layers=8))
    assert text.splitlines()[0] == "8 layers = 2 x a period of 4"
    assert text.count("chunks of 4 by document") == 3 and "NoPE" in text and "LogFloor" in text
