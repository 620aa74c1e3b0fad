"""What is kept changes memory and no gradient; names; and `kept` against what jax and the compiler hold.

XLA:CPU takes offloading and keeps everything in the memory that it has, so numbers are tested with it as it is; that
what is offloaded lies on the host of a TPU is read from a program compiled for one.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from irope_jax.core.config import ConfigError, from_dict, override, to_dict
from irope_jax.core.numerics import assert_close
from irope_jax.core.types import Precision, TokenInfo
from irope_jax.model.config import ModelConfig, irope_layers
from irope_jax.model.decoder import Period, hidden_states, init_params
from irope_jax.model.feed_forward import SwiGLU
from irope_jax.model.kept import UNNAMED, layer_memory, share
from irope_jax.model.moe import MoE
from irope_jax.model.remat import NAMES, PRESETS, Remat
from irope_jax.sharding.mesh import MeshConfig, make_mesh
from irope_jax.sharding.rules import batch_sharding
from tests.topologies import described, targeting, tpu_mesh

B, T = 2, 16
BY_NAME = Remat(
    save=("query", "value", "attention_lse", "up", "router_logits", "expert_up"),
    offload=("layer_input", "attention_out", "after_attention", "gate", "expert_rows"),
)


def model(**changes) -> ModelConfig:
    pattern = irope_layers(4, MoE(4, 16, shared=SwiGLU(16)), interval=2, qk_norm="rms")
    base = dict(vocab_size=32, d_model=16, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=8, init_std=0.3)
    return ModelConfig(**base | dict(pattern=pattern) | changes)


def gradients(config, mesh=None):
    params = nn.meta.unbox(jax.jit(lambda: init_params(model(), jax.random.key(0)))())
    tokens, info = jax.random.randint(jax.random.key(1), (B, T), 0, 32), TokenInfo.single(B, T)
    loss = lambda p, tokens, info: jnp.square(hidden_states(config, p, tokens, info)[0]).mean()
    if mesh is None:
        return jax.jit(jax.grad(loss))(params, tokens, info)
    info = info.replace(first_row=None)
    tokens, info = jax.tree.map(lambda x: jax.device_put(x, batch_sharding(mesh)), (tokens, info))
    with jax.set_mesh(mesh):
        return jax.jit(jax.grad(loss))(params, tokens, info)


@pytest.fixture(scope="module")
def plain():
    return gradients(model())


@pytest.mark.parametrize("remat", ["full", "dots", "offload", BY_NAME], ids=["full", "dots", "offload", "by name"])
def test_no_choice_changes_a_gradient(remat, plain):
    assert_close(gradients(model(remat=remat)), plain, what=f"gradients with {remat}")


def test_nor_on_a_mesh_that_cuts_batch_sequence_and_experts(plain):
    mesh = make_mesh(MeshConfig(data=1, context=2, expert=2), jax.devices()[:4])
    layout = dataclasses.replace(model().context, layout="contiguous")
    assert_close(gradients(model(remat=BY_NAME, context=layout), mesh), plain, what="gradients on four devices")


def test_every_name_is_carried_by_some_tensor():
    found = {kept.name for kept in layer_memory(model(), model().pattern[0], B, T).kept}
    found |= set(layer_memory(model(remat="full"), model().pattern[0], B, T).again)
    assert found & set(NAMES) | {"layer_input"} == set(NAMES)


def test_names_and_words_that_do_not_exist_are_errors():
    with pytest.raises(ConfigError, match=r"save='querry'.*did you mean 'query'"):
        Remat(save=("querry",))
    with pytest.raises(ConfigError, match="also in `save`"):
        Remat(save=("gate",), offload=("gate",))
    with pytest.raises(ConfigError, match=r"remat=ful:.*did you mean 'full'"):
        model(remat="ful")
    written = to_dict(model(remat=BY_NAME))
    assert from_dict(ModelConfig, written) == model(remat=BY_NAME)
    assert from_dict(ModelConfig, override(written, [("remat", "attention")])).remat == "attention"
    typed = override(to_dict(model()), [("remat", "{'kind': 'names', 'save': ('gate',)}")])
    assert from_dict(ModelConfig, typed).remat == Remat(save=("gate",))
    written["remat"]["offload"] = ["gat"]
    with pytest.raises(ConfigError, match=r"config.remat.offload='gat'"):
        from_dict(ModelConfig, written)


def test_what_is_kept_by_hand():
    """bfloat16: B T D = 2 x 16 x 16 numbers, of which the host has two bytes each."""
    config = model(remat=BY_NAME, precision=Precision(compute="bfloat16"))
    memory = layer_memory(config, config.pattern[1], B, T)
    sizes = {(kept.name, kept.where): kept.bytes for kept in memory.kept if kept.name in NAMES}
    tokens = B * T
    assert sizes == {
        ("layer_input", "host"): tokens * 16 * 2,
        ("query", "device"): tokens * 4 * 8 * 2,
        ("value", "device"): tokens * 2 * 8 * 2,
        ("attention_out", "host"): tokens * 4 * 8 * 2,
        ("attention_lse", "device"): tokens * 4 * 4,
        ("after_attention", "host"): tokens * 16 * 2,
        ("gate", "host"): tokens * 16 * 2,
        ("up", "device"): tokens * 16 * 2,
        ("router_logits", "device"): tokens * 4 * 4,
        ("expert_rows", "host"): tokens * 16 * 2,
        ("expert_up", "device"): tokens * 16 * 2,
    }
    assert set(memory.again) == {"attention_input", "key", "feed_forward_input", "expert_gate", "expert_out"}
    quarter = share(config, MeshConfig(data=1, tensor=2))
    half = {k.name: k.bytes for k in layer_memory(quarter, quarter.pattern[1], B, T).kept}
    assert half["query"] == tokens * 2 * 8 * 2 and half["up"] == tokens * 8 * 2
    assert half["layer_input"] == tokens * 16 * 2


@pytest.mark.parametrize("remat", ["none", "full", "dots", BY_NAME], ids=["none", "full", "dots", "by name"])
def test_what_is_kept_is_what_the_scan_stacks(remat):
    """Leaves of the whole period's pullback, parameters left out, against the sum over its layers."""
    config = model(remat=remat, num_layers=2)
    period, info = Period(config), TokenInfo.single(B, T)
    x = jax.ShapeDtypeStruct((B, T, 16), jnp.float32)
    params = nn.meta.unbox(jax.eval_shape(lambda x: period.init(jax.random.key(0), x, info)["params"], x))
    pull = lambda p, x: jax.vjp(lambda p, x: period.apply({"params": p}, x, info)[0], p, x)[1]
    jaxpr = jax.make_jaxpr(pull)(params, x).jaxpr
    weights = set(jaxpr.invars[: len(jax.tree.leaves(params))])
    held = {v for v in jaxpr.outvars if not hasattr(v, "val")} - weights
    floats = lambda avals: sum(a.size * a.dtype.itemsize for a in avals if jnp.issubdtype(a.dtype, jnp.floating))
    told = sum(k.bytes for layer in config.period for k in layer_memory(config, layer, B, T).kept)
    whole = floats(v.aval for v in held)
    integers = 18_000 if remat == "none" else 3000  # coordinates and plans are told too
    assert whole <= told <= whole + integers, (whole, told)


def test_what_is_kept_is_what_the_compiler_then_needs():
    """Many repeats of a layer: what the compiled gradient takes more than with `full` is what is named, R times."""
    repeats, length = 32, 256
    base = dict(num_layers=repeats, pattern=irope_layers(64, SwiGLU(64), interval=1))
    params = jax.eval_shape(lambda: nn.meta.unbox(init_params(model(**base), jax.random.key(0))))
    tokens, info = jax.ShapeDtypeStruct((B, length), jnp.int32), TokenInfo.single(B, length)

    def temp(remat):
        loss = lambda p, tokens: jnp.square(hidden_states(model(**base, remat=remat), p, tokens, info)[0]).mean()
        return jax.jit(jax.grad(loss)).lower(params, tokens).compile().memory_analysis().temp_size_in_bytes

    config = model(**base, remat=Remat(save=("gate", "up")))
    more = sum(k.bytes for k in layer_memory(config, config.pattern[0], B, length).kept if k.name in ("gate", "up"))
    assert abs(temp(config.remat) - temp("full") - repeats * more) < 0.05 * repeats * more


def test_nothing_is_without_a_name_where_names_are_given():
    for remat in ("full", "attention", "offload", BY_NAME):
        kept = layer_memory(model(remat=remat), model().pattern[0], B, T).kept
        assert UNNAMED not in {one.name for one in kept}, remat


def test_offloaded_tensors_lie_on_the_host_of_a_tpu():
    """Layers of 2 MB of input, four repeats: with `offload_inputs` the host has them, and the device no longer."""
    mesh = tpu_mesh("v5e:2x2", data=1)
    repeats, length, width = 4, 512, 1024
    base = dict(d_model=width, num_layers=repeats, pattern=irope_layers(64, SwiGLU(128), interval=1))
    shapes = jax.eval_shape(lambda: nn.meta.unbox(init_params(model(**base), jax.random.key(0))))
    with targeting(mesh):
        params = jax.tree.map(lambda x: described(mesh, x.shape, x.dtype), shapes)
        tokens = described(mesh, (1, length), jnp.int32, P())

        def memory(remat):
            config = model(**base, remat=remat, attention="reference")
            loss = lambda p, x: jnp.square(hidden_states(config, p, x, TokenInfo.single(1, length))[0]).mean()
            return jax.jit(jax.grad(loss)).lower(params, tokens).compile().memory_analysis()

        assert memory("offload_inputs").host_temp_size_in_bytes >= repeats * length * width * 4
        assert memory("full").host_temp_size_in_bytes == 0


def test_presets_are_lists_of_names_or_say_otherwise():
    assert {word for word, remat in PRESETS.items() if remat is None} == {"none", "dots"}
