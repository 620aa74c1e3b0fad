"""Generation is the arg-max of forward passes: ragged batches, prefixes, samples, guesses, stops, eight devices."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from irope_jax.attention.mask import Global, Sliding
from irope_jax.core.config import ConfigError
from irope_jax.core.types import TokenInfo
from irope_jax.decode.generate import Generation, Generator
from irope_jax.decode.prefill import piece_step, prefill
from irope_jax.decode.sampling import Sampling
from irope_jax.model.cache import CacheSpec, new_cache
from irope_jax.model.config import LayerSpec, ModelConfig, irope_layers
from irope_jax.model.cost import abstract_params
from irope_jax.model.decoder import init_params, logits
from irope_jax.model.feed_forward import SwiGLU
from irope_jax.model.moe import Capacity, MoE
from irope_jax.position.encoding import NoPE, RoPE
from irope_jax.position.extension import SelfExtend
from irope_jax.position.temperature import LogFloor
from irope_jax.sharding.mesh import MeshConfig, make_mesh
from irope_jax.sharding.rules import tree_shardings
from tests.quickly import keep

FFN = SwiGLU(16)
BASE = dict(vocab_size=24, d_model=16, num_heads=4, num_kv_heads=2, head_dim=8, init_std=0.3)
PATTERN = (
    *irope_layers(8, FFN, temperature=LogFloor(8, 0.5), interval=2),
    LayerSpec(RoPE(), Sliding(5), MoE(4, 16, top_k=2)),
)
MODEL = ModelConfig(**BASE, num_layers=3, pattern=PATTERN, attention="reference")
NEW = 12
SPEC = partial(Generation, tokens=NEW, numbers="float32", piece=16, steps=5)
rng = np.random.default_rng(1)
PROMPTS = [rng.integers(0, 24, n).astype(np.int32) for n in (19, 7, 26, 1)]


@pytest.fixture(scope="module")
def params():
    return nn.meta.unbox(jax.jit(lambda: init_params(MODEL, jax.random.key(0)))())


@pytest.fixture(scope="module")
def greedy(params):
    """The arg-max continuation of any text, by whole forward passes."""
    longest = 64

    @jax.jit
    def forward(tokens):
        return logits(MODEL, params, tokens, TokenInfo.single(1, longest))[0].argmax(-1)

    def go_on(text, count=NEW):
        text = list(text)
        for _ in range(count):
            padded = np.zeros((1, longest), np.int32)
            padded[0, : len(text)] = text
            text.append(int(forward(jnp.asarray(padded))[len(text) - 1]))
        return text[-count:]

    return go_on


def placed(params, mesh):
    return jax.device_put(params, tree_shardings(abstract_params(MODEL), mesh))


def test_all_pieces_of_a_prompt_are_one_program(params, caplog):
    piece_step.cache_clear()
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    with jax.set_mesh(mesh):
        cache = new_cache(MODEL, CacheSpec(1, 32, "float32"))
        weights = placed(params, mesh)
        with jax.log_compiles():
            prefill(MODEL, weights, cache, [PROMPTS[2]], size=8)  # four pieces
    compiled = [r.getMessage() for r in caplog.records if r.getMessage().startswith("Compiling jit(step)")]
    assert len(compiled) == 1, compiled


@pytest.mark.parametrize("devices", keep(8, of=(1, 8)))
def test_a_ragged_batch_is_each_row_alone(params, greedy, devices):
    config = MeshConfig(data=1, context=4, tensor=2) if devices == 8 else MeshConfig()
    mesh = make_mesh(config, jax.devices()[:devices])
    with jax.set_mesh(mesh):
        generator = Generator(MODEL, placed(params, mesh), SPEC())
        seen = []
        rows = generator.generate(
            PROMPTS, on_tokens=lambda row, new: seen.append((row.prompt, *new)), progress=seen.append
        )
    assert [row.tokens for row in rows] == [greedy(prompt) for prompt in PROMPTS]
    assert {row.ended for row in rows} == {"length"}
    assert [n for n in seen if isinstance(n, int)] == [16 + 7 + 16 + 1, 3 + 10]  # by pieces
    streamed = [[t for s in seen if isinstance(s, tuple) and s[0] == b for t in s[1:]] for b in range(4)]
    assert streamed == [row.tokens for row in rows]
    assert (generator.speed.read, generator.speed.made, generator.speed.steps) == (53, 4 * NEW, NEW - 1)


def test_a_prefix_is_read_once_and_stays(params, greedy):
    generator = Generator(MODEL, params, SPEC())
    prefix = generator.read([PROMPTS[2]])
    for _ in range(2):
        rows = generator.generate([PROMPTS[0], PROMPTS[1], []], prefix=prefix)
        want = [greedy([*PROMPTS[2], *more]) for more in (PROMPTS[0], PROMPTS[1], [])]
        assert [row.tokens for row in rows] == want
    assert generator.speed.read == 26 + 2 * (19 + 7)


def test_samples_share_a_prompt_and_draw_as_rows_of_their_own_would(params):
    spec = dict(sampling=Sampling(1.0, top_p=0.95, seed=5), samples=3)
    rows = Generator(MODEL, params, SPEC(**spec)).generate(PROMPTS[:2])
    assert [(row.prompt, row.sample) for row in rows] == [(p, s) for p in (0, 1) for s in range(3)]
    texts = [tuple(row.tokens) for row in rows]
    assert len(set(texts)) == 6
    prefix = Generator(MODEL, params, SPEC(**spec)).read(PROMPTS[:1])
    assert [tuple(r.tokens) for r in Generator(MODEL, params, SPEC(**spec)).generate([[]], prefix=prefix)] == texts[:3]
    other = dict(spec, samples=1, steps=2)
    assert tuple(Generator(MODEL, params, SPEC(**other)).generate(PROMPTS[:1])[0].tokens) == texts[0]


def test_guesses_change_nothing_but_the_number_of_steps(params, greedy):
    repeating = np.tile(PROMPTS[1], 4)
    prompts = [repeating, PROMPTS[0], PROMPTS[3]]
    generator = Generator(MODEL, params, SPEC(tokens=20, guesses=4))
    rows = generator.generate(prompts)
    assert [row.tokens for row in rows] == [greedy(prompt, 20) for prompt in prompts]
    assert generator.speed.steps < 19
    with pytest.raises(ConfigError, match=r"guesses=4.*temperature 0"):
        SPEC(guesses=4, sampling=Sampling(1.0))


@pytest.mark.parametrize("guesses", [0, 3])
def test_stop_tokens_and_the_caller_end_rows(params, greedy, guesses):
    want = greedy(PROMPTS[0])
    stop = next(token for i, token in enumerate(want) if i > 2 and token not in want[:i])
    before = want[: want.index(stop)]
    generator = Generator(MODEL, params, SPEC(stop_tokens=(stop,), guesses=guesses))
    row = generator.generate(PROMPTS[:1])[0]
    assert (row.tokens, row.ended) == (before, "stop")
    row = generator.generate(PROMPTS[:1], on_tokens=lambda row, new: len(row.tokens) >= 2)[0]
    assert row.ended == "caller" and row.tokens == before[: len(row.tokens)]


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (LayerSpec(SelfExtend(4, 2), Global(), FFN), "pattern.0.position.kind='self_extend': attends in several parts"),
        (LayerSpec(NoPE(), Global(), FFN, temperature=LogFloor(8, by="length")), "temperature.by='length'"),
        (LayerSpec(NoPE(), Global(), MoE(2, 16, dispatch=Capacity())), "ffn.dispatch.kind='capacity': drops tokens"),
    ],
)
def test_what_cannot_be_decoded_says_why(layer, message):
    model = ModelConfig(**BASE, num_layers=1, pattern=(layer,))
    with pytest.raises(ConfigError, match=message):
        Generator(model, None, SPEC()).read(PROMPTS)


def test_empty_prompts_and_batches_that_do_not_divide_are_refused(params):
    with pytest.raises(ConfigError, match="prompt 1"):
        Generator(MODEL, params, SPEC()).read([PROMPTS[0], []])
    with jax.set_mesh(make_mesh(MeshConfig(data=8))), pytest.raises(ConfigError, match="4 rows do not divide"):
        Generator(MODEL, params, SPEC()).read(PROMPTS)
