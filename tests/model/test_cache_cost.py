"""What one step of decoding costs, read from the compiled program: bytes between devices, in memory, and copied."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from irope_jax.attention import cached
from irope_jax.attention.mask import Global
from irope_jax.core.numerics import tree_bytes
from irope_jax.core.types import Precision
from irope_jax.model.cache import CacheSpec
from irope_jax.model.config import LayerSpec, ModelConfig, irope_layers
from irope_jax.model.decoder import cached_hidden_states
from irope_jax.model.feed_forward import SwiGLU
from irope_jax.plan.compiled import abstract_cache, abstract_weights
from irope_jax.plan.hlo import analyse
from irope_jax.position.encoding import NoPE
from irope_jax.sharding.mesh import MeshConfig, make_mesh
from tests.quickly import keep
from tests.topologies import targeting, tpu_mesh

FFN = SwiGLU(16)
N, K, H, LONG = 4, 2, 64, 262_144


def model(*pattern, layers) -> ModelConfig:
    return ModelConfig(
        vocab_size=32, d_model=16, num_layers=layers, num_heads=N, num_kv_heads=K, head_dim=H, pattern=pattern
    )


def scout_like(layers: int, **more) -> ModelConfig:
    """With the heads of Scout, in bfloat16."""
    config = model(*irope_layers(8192, FFN, **more), layers=layers)
    heads = dict(num_heads=40, num_kv_heads=8, head_dim=128)
    return dataclasses.replace(config, **heads, precision=Precision("bfloat16", "bfloat16"))


def compiled_step(config, spec, mesh, width=1):
    """One step of `width` tokens a row, from abstract arrays: nothing is allocated."""

    def step(params, cache, tokens):
        info = cache.next_info(jnp.ones(tokens.shape, bool))
        hidden, w, cache = cached_hidden_states(config, params, tokens, info, cache)
        return jnp.argmax(hidden[:, -1] @ w, axis=-1), cache

    with jax.set_mesh(mesh):
        params, cache = abstract_weights(config, mesh), abstract_cache(config, spec, mesh)
        tokens = jax.ShapeDtypeStruct((spec.batch, width), jnp.int32)
        return jax.jit(step, donate_argnums=1).lower(params, cache, tokens).compile(), cache


def test_a_step_sends_the_partial_results_of_global_layers_whatever_the_length():
    config = model(*irope_layers(8192, FFN, qk_norm="rms"), layers=8)
    mesh = make_mesh(MeshConfig(data=1, context=8))
    sent = {}
    for length in (LONG, 4 * LONG):
        program, _ = compiled_step(config, CacheSpec(2, length), mesh)
        sent[length] = analyse(program.as_text()).collective_bytes
    rows, global_layers = 2, 2
    assert sent[LONG] == sent[4 * LONG] == {"all-reduce": global_layers * rows * 2 * 7 / 8 * N * (H + 2) * 4}


def test_heads_over_tensor_and_keys_over_context_send_no_more_at_any_length():
    config = model(*irope_layers(8192, FFN), layers=4)
    mesh = make_mesh(MeshConfig(data=1, context=4, tensor=2))
    texts = [compiled_step(config, CacheSpec(1, n), mesh)[0].as_text() for n in (LONG, 4 * LONG)]
    small, large = (analyse(text).collective_bytes for text in texts)
    assert small == large and sum(small.values()) < 20_000


@pytest.mark.parametrize("numbers", ["float32", "bfloat16", "int8", "int4"])
def test_the_cache_is_updated_where_it_lies(numbers):
    config = model(*irope_layers(8192, FFN), layers=8)
    program, cache = compiled_step(config, CacheSpec(1, 4 * LONG, numbers), make_mesh(MeshConfig(), jax.devices()[:1]))
    memory = program.memory_analysis()
    assert memory.alias_size_in_bytes == tree_bytes(cache)
    assert memory.temp_size_in_bytes < 0.05 * tree_bytes(cache)


def test_a_step_reads_the_cache_once(monkeypatch):
    """XLA counts the body of a loop once, so all slots are one block here."""
    monkeypatch.setattr(cached, "FEWEST", LONG)
    config = dataclasses.replace(model(LayerSpec(NoPE(), Global(), FFN), layers=1), num_heads=K)
    program, cache = compiled_step(config, CacheSpec(1, LONG, "float32"), make_mesh(MeshConfig(), jax.devices()[:1]))
    ratio = program.cost_analysis()["bytes accessed"] / tree_bytes(cache)
    assert ratio < 1.15


@pytest.mark.parametrize(("rows", "width"), [(16, 1), (2, 128)])
def test_a_tpu_does_not_copy_the_cache_for_several_rows_or_a_piece_of_a_prompt(rows, width):
    mesh = tpu_mesh("v5e:2x2", context=4)
    config = scout_like(layers=8)
    with targeting(mesh):
        program, cache = compiled_step(config, CacheSpec(rows, LONG // rows), mesh, width)
    assert program.memory_analysis().temp_size_in_bytes < 0.1 * tree_bytes(cache) / 4


@pytest.mark.parametrize(("numbers", "share"), keep(("bfloat16", 0.02), of=(("bfloat16", 0.02), ("int8", 0.08))))
def test_a_tpu_neither_copies_the_cache_nor_sends_more(numbers, share):
    """Compiled for four chips at Scout's heads: what the layout of a cache costs is seen only there."""
    mesh = tpu_mesh("v5p:2x2x1", context=4)
    config = scout_like(layers=8, qk_norm="rms")
    with targeting(mesh):
        program, cache = compiled_step(config, CacheSpec(1, 4 * LONG, numbers), mesh)
    here = tree_bytes(cache) / 4
    assert program.memory_analysis().temp_size_in_bytes < share * here
    assert analyse(program.as_text()).collective_bytes == {"all-reduce": 2 * 2 * 3 / 4 * 40 * (128 + 2) * 4}


def test_on_a_tpu_what_lies_on_the_host_is_updated_there_and_a_device_holds_blocks_of_it():
    """Compiled for four chips, a cache of 4 GB at Scout's heads: one token, which sends what it always does."""
    mesh = tpu_mesh("v5e:2x2", context=4)
    config = scout_like(layers=4)
    with targeting(mesh):
        program, cache = compiled_step(config, CacheSpec(1, 4 * LONG, offload=True), mesh)
    memory, far = program.memory_analysis(), cache.layers[3]
    on_host = tree_bytes(far) / 4
    assert memory.host_alias_size_in_bytes == pytest.approx(on_host, rel=1e-3) and memory.host_temp_size_in_bytes == 0
    assert memory.argument_size_in_bytes + memory.temp_size_in_bytes < 0.3 * on_host
    assert analyse(program.as_text()).collective_bytes == {"all-reduce": 2 * 3 / 4 * 40 * (128 + 2) * 4}
