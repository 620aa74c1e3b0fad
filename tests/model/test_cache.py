"""Reading with a cache is one forward pass: token by token, in pieces, ragged, forked, on one device and on eight."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from irope_jax.attention.mask import Chunked, Global, Sliding, allowed
from irope_jax.core.config import ConfigError
from irope_jax.core.numerics import assert_close, tree_bytes
from irope_jax.core.types import TokenInfo
from irope_jax.model.cache import CacheSpec, cache_bytes, empty_cache, fork, new_cache, row_bytes
from irope_jax.model.config import LayerSpec, ModelConfig, irope_layers
from irope_jax.model.cost import abstract_params
from irope_jax.model.decodable import for_documents_of
from irope_jax.model.decoder import cached_hidden_states, hidden_states, init_params
from irope_jax.model.feed_forward import SwiGLU
from irope_jax.position.encoding import ALiBi, NoPE, RoPE
from irope_jax.position.scaling import NTK, DynamicNTK, Llama3, LongRoPE, YaRN
from irope_jax.position.temperature import LogFloor, SSMax
from irope_jax.sharding.mesh import MeshConfig, make_mesh
from irope_jax.sharding.rules import tree_shardings
from tests.quickly import keep

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


@functools.cache
def params_of(config):
    return nn.meta.unbox(jax.jit(lambda: init_params(config, jax.random.key(0)))())


def tokens_of(batch=4, length=T):
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


@functools.cache
def case(name):
    """A model, its parameters, ragged rows, and the logits of one forward pass."""
    config, tokens, real = MODELS[name], tokens_of(), real_of()
    params = params_of(config)
    return config, params, tokens, real, whole(config, params, tokens, real)


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


ON_ONE = [(1, name) for name in MODELS]
ON_EIGHT = [(8, name) for name in MODELS]


@pytest.mark.parametrize(
    ("devices", "name"), keep(*ON_ONE, (8, "irope"), (8, "all kinds"), (8, "global alibi"), of=ON_ONE + ON_EIGHT)
)
def test_token_by_token_is_one_forward_pass(name, devices):
    config, params, tokens, real, want = case(name)
    mesh = make_mesh(EIGHT if devices == 8 else MeshConfig(), jax.devices()[:devices])
    with jax.set_mesh(mesh):
        params = jax.device_put(params, tree_shardings(abstract_params(config), mesh))
        cache = new_cache(config, CacheSpec(len(LENGTHS), 32, "float32"))
        found, cache = in_pieces(config, params, tokens, real, cache, [(1, T)])
    assert_close(found[real], want[real], rtol=0, atol=1e-4)
    assert cache.lengths.tolist() == list(LENGTHS)


@pytest.mark.parametrize("devices", keep(8, of=(1, 8)))
def test_what_lies_on_the_host_is_read_and_written_as_what_lies_on_the_device(devices):
    """The same arrays and programs where there is one memory; rows that are full beyond their last token stay so."""
    config, params, tokens, real, want = case("irope")
    mesh = make_mesh(EIGHT if devices == 8 else MeshConfig(), jax.devices()[:devices])
    spec = CacheSpec(len(LENGTHS), 32, "float32", offload=True)
    with jax.set_mesh(mesh):
        params = jax.device_put(params, tree_shardings(abstract_params(config), mesh))
        places = tree_shardings(jax.eval_shape(lambda: empty_cache(config, spec)), mesh)
        cache = jax.device_put(nn.meta.unbox(empty_cache(config, spec)), places)
        assert tree_bytes(cache) == sum(kind.total for kind in cache_bytes(config, spec)) + row_bytes(spec)
        found, cache = in_pieces(config, params, tokens, real, cache, [(20, 1), (1, 9)])
    assert_close(found[real], want[real], rtol=0, atol=1e-4)
    assert cache.lengths.tolist() == list(LENGTHS)


def test_what_cannot_be_offloaded_is_refused():
    with pytest.raises(ConfigError, match="use bfloat16 instead of int8"):
        CacheSpec(1, 8, "int8", offload=True)
    with jax.set_mesh(make_mesh(MeshConfig(), jax.devices()[:1])), pytest.raises(ConfigError, match="one memory only"):
        new_cache(MODELS["irope"], CacheSpec(1, 8, offload=True))


@pytest.mark.parametrize(("devices", "cuts"), [(1, [(20, 1), (3, 3)]), (8, [(3, 1), (8, 3), (1, 2)])])
def test_any_pieces_are_one_forward_pass(devices, cuts):
    """Pieces that end inside chunks and beyond several, of widths that four devices share and of others."""
    config, params, tokens, real, want = case("all kinds")
    mesh = make_mesh(EIGHT if devices == 8 else MeshConfig(), jax.devices()[:devices])
    with jax.set_mesh(mesh):
        params = jax.device_put(params, tree_shardings(abstract_params(config), mesh))
        cache = new_cache(config, CacheSpec(len(LENGTHS), 32, "float32"))
        found, _ = in_pieces(config, params, tokens, real, cache, cuts)
    assert_close(found[real], want[real], rtol=0, atol=1e-4)


@pytest.mark.parametrize("scaling", [DynamicNTK(2.0, 8, step=4), LONG], ids=lambda s: s.kind)
def test_frequencies_that_follow_the_length_are_those_of_the_length_that_was_said(scaling):
    config = model(layer(RoPE(scaling=scaling), Global()))
    params, tokens = params_of(config), tokens_of(batch=1)
    with pytest.raises(ConfigError, match=f"pattern.0.position.scaling.kind='{scaling.kind}'.*follow the length"):
        new_cache(config, CacheSpec(1, 32, "float32"))
    real = real_of((T,))
    want = whole(config, params, tokens, real)
    fixed = for_documents_of(config, T)
    found, _ = in_pieces(fixed, params, tokens, real, new_cache(fixed, CacheSpec(1, 32, "float32")), [(1, T)])
    assert_close(found, want, rtol=0, atol=1e-4)
    short = for_documents_of(config, 8)
    found, _ = in_pieces(short, params, tokens, real, new_cache(short, CacheSpec(1, 32, "float32")), [(1, T)])
    assert np.abs(found - want).max() > 1e-2  # what the test tells apart


def test_what_a_cache_holds_is_a_picture():
    """Which rows the slots of each mask hold after 0 … 9 tokens, and which of them the next query sees."""
    config = model(layer(NoPE(), Global()), layer(NoPE(), Chunked(4)), layer(NoPE(), Sliding(3)))
    params, tokens = params_of(config), tokens_of(batch=1)
    cache, drawn = new_cache(config, CacheSpec(1, 10, "float32")), []
    step = jax.jit(lambda c, t: cached_hidden_states(config, params, t, c.next_info(jnp.ones((1, 1))), c)[2])
    for at in range(10):
        cache = step(cache, tokens[:, at : at + 1])
        query = TokenInfo(*(jnp.full((1, 1), x, jnp.int32) for x in (at, 1, at)))
        line = []
        for mask, there in zip(cache.masks, cache.coordinates):
            held = np.where(there.segments[0] > 0, there.rows[0], -1)
            seen = np.asarray(allowed(mask, query, there))[0, 0]
            line.append("".join(str(r) if s else "-" if r < 0 else "x" for r, s in zip(held.tolist(), seen)))
        drawn.append(" ".join(line))
    assert drawn == [
        "0--------- 0--- 0--",
        "01-------- 01-- 01-",
        "012------- 012- 012",
        "0123------ 0123 312",
        "01234----- 4xxx 342",
        "012345---- 45xx 345",
        "0123456--- 456x 645",
        "01234567-- 4567 675",
        "012345678- 8xxx 678",
        "0123456789 89xx 978",
    ]


@pytest.mark.parametrize(("mask", "full"), [(Global(), True), (Sliding(6), True), (Sliding(3), False)], ids=str)
def test_a_row_without_room_gets_nan_and_others_do_not(mask, full):
    """Four slots: too few for what a longer window sees, enough for a shorter one at any length."""
    config = model(layer(NoPE(), mask))
    params, tokens = params_of(config), tokens_of(batch=2, length=5)
    real = real_of((3, 5), 5)
    found, _ = in_pieces(config, params, tokens, real, new_cache(config, CacheSpec(2, 4, "float32")), [(1, 5)])
    assert np.isfinite(found[:, :4]).all() and np.isfinite(found[0]).all()
    assert np.isnan(found[1, 4]).all() == full


@pytest.mark.parametrize("devices", keep(8, of=(1, 8)))
def test_rows_that_go_on_from_one_prefix_are_separate_rows(devices):
    config, prefix_length = MODELS["all kinds"], 11
    params, tokens = params_of(config), tokens_of()
    tokens = tokens.at[:2, :prefix_length].set(tokens[0, :prefix_length])
    tokens = tokens.at[2:, :prefix_length].set(tokens[2, :prefix_length])
    real = real_of()
    want = whole(config, params, tokens, real)
    mesh = make_mesh(EIGHT if devices == 8 else MeshConfig(), jax.devices()[:devices])
    with jax.set_mesh(mesh):
        params = jax.device_put(params, tree_shardings(abstract_params(config), mesh))
        two = slice(0, 4, 2)
        prefix = new_cache(config, CacheSpec(2, 12, "float32"))
        head = np.ones((2, prefix_length), bool)
        _, prefix = in_pieces(config, params, tokens[two, :prefix_length], head, prefix, [(prefix_length, 1)])
        rows = fork(config, prefix, CacheSpec(4, 20, "float32"))
        rest = slice(prefix_length, None)
        found, rows = in_pieces(config, params, tokens[:, rest], real[:, rest], rows, [(4, 2), (1, 10)])
    assert_close(found[real[:, rest]], want[:, rest][real[:, rest]], rtol=0, atol=1e-4)
    assert rows.lengths.tolist() == list(LENGTHS) and prefix.lengths.tolist() == [prefix_length] * 2
    with pytest.raises(ConfigError, match=r"batch=3.*go on from 2 each"):
        fork(config, prefix, CacheSpec(3, 20))


def test_tokens_can_be_taken_back_within_the_slack():
    config = MODELS["all kinds"]
    params, tokens, real = params_of(config), tokens_of(batch=2), real_of((T, T))
    want = whole(config, params, tokens, real)
    wrong = (tokens + 1) % 32

    @jax.jit
    def run(params, cache):
        def step(cache, at):
            take = lambda x, n: jax.lax.dynamic_slice_in_dim(x, at, n, 1)
            guess = jnp.concatenate([take(tokens, 1), jax.lax.dynamic_slice_in_dim(wrong, at, 3, 1)], 1)
            hidden, w, after = cached_hidden_states(config, params, guess, cache.next_info(jnp.ones((2, 4))), cache)
            return after.rewound(cache.lengths + 1), (hidden @ w)[:, 0]

        return jax.lax.scan(step, cache, jnp.arange(T - 4))[1]

    found = run(params, new_cache(config, CacheSpec(2, 40, "float32", slack=3)))
    assert_close(np.moveaxis(found, 0, 1), want[:, : T - 4], rtol=0, atol=1e-4)
    short = run(params, new_cache(config, CacheSpec(2, 40, "float32")))
    assert np.abs(np.moveaxis(short, 0, 1) - want[:, : T - 4]).max() > 1e-2


@pytest.mark.parametrize(("numbers", "bound"), [("bfloat16", 0.002), ("int8", 0.005), ("int4", 0.1)])
def test_smaller_numbers_cost_little(numbers, bound):
    """Relative error of logits, root mean square, at the head width of Llama 4 and its initial weights."""
    config = model(*IROPE, layers=4, d_model=256, num_heads=2, num_kv_heads=1, head_dim=128, init_std=0.02)
    params, tokens, real = params_of(config), tokens_of(batch=2), real_of((T, T))
    want = whole(config, params, tokens, real)
    cache = new_cache(config, CacheSpec(2, 32, numbers))
    found, _ = in_pieces(config, params, tokens, real, cache, [(20, 1), (1, 9)])
    error = np.sqrt(np.square(found - want).mean() / np.square(want).mean())
    assert bound / 20 < error < bound


SCOUT = model(
    *irope_layers(8192, FFN), layers=48, d_model=5120, num_heads=40, num_kv_heads=8, head_dim=128, vocab_size=202_048
)  # the cache of Scout; its feed-forward has no part in it
GIB = 2**30


@pytest.mark.parametrize("length", [1_048_576, 10_485_760])
def test_bytes_of_llama_4_scout(length):
    near, far = cache_bytes(SCOUT, CacheSpec(1, length))
    assert (near.layers, near.slots, far.layers, far.slots) == (36, 8192, 12, length)
    assert near.keys_values == 1.125 * GIB and far.keys_values == {1_048_576: 48, 10_485_760: 480}[length] * GIB
    for numbers, share, scales in (("int8", 2, 1 / 8), ("int4", 4, 1 / 4)):
        for small, large in zip(cache_bytes(SCOUT, CacheSpec(1, length, numbers)), (near, far)):
            assert small.keys_values * share == large.keys_values
            assert small.scales == scales * small.keys_values  # 2 bytes for 16 numbers


@pytest.mark.parametrize(
    "config", [MODELS["all kinds"], MODELS["chunked llama3"], SCOUT], ids=["kinds", "near", "scout"]
)
@pytest.mark.parametrize(("numbers", "block"), [("float32", None), ("bfloat16", None), ("int8", 4), ("int4", None)])
def test_the_closed_form_is_what_is_made(config, numbers, block):
    spec = CacheSpec(3, 1_048_576, numbers, block, slack=2)
    made = jax.eval_shape(lambda: nn.meta.unbox(empty_cache(config, spec)))
    assert sum(kind.total for kind in cache_bytes(config, spec)) + row_bytes(spec) == tree_bytes(made)


def test_devices_hold_their_part_and_only_that():
    mesh = make_mesh(EIGHT)
    with jax.set_mesh(mesh):
        cache = new_cache(MODELS["all kinds"], CacheSpec(2, 64, "int8"))
    shard = lambda x: x.addressable_shards[0].data.shape
    near, far, sliding = (cache.layers[i].keys for i in (0, 1, 2))
    assert (far.data.shape, shard(far.data)) == ((1, 2, 2, 64, 8), (1, 2, 1, 16, 8))
    assert (near.data.shape, shard(near.data)) == ((1, 2, 2, 8, 8), (1, 2, 1, 8, 8))
    assert (sliding.data.shape, shard(sliding.scales)) == ((1, 2, 2, 5, 8), (1, 2, 1, 1, 5))
    assert shard(far.scales) == (1, 2, 1, 1, 16)
    with jax.set_mesh(mesh), pytest.raises(ConfigError, match=r"mesh.context=4.*use 2"):
        new_cache(MODELS["all kinds"], CacheSpec(2, 62))
