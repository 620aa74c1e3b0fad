"""One token at a time, keys and values kept, gives the logits of one forward pass: through the plain masks.

Every layer here keeps all keys with their coordinates, and its mask alone says which of them a new token sees. So what
is judged is the model: nothing that it computes of a token may depend on how many others pass with it.
"""

import itertools
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from irope_jax.attention.api import attend
from irope_jax.attention.mask import Chunked
from irope_jax.core.types import PAD_SEGMENT, TokenInfo
from irope_jax.model import self_attention
from irope_jax.model.decoder import DecoderLayer, logits
from irope_jax.model.layers import Norm
from irope_jax.transfer import read_source

GOLDEN = Path(__file__).parent.parent / "golden" / "families"


def one_by_one(model, params, tokens_BT, monkeypatch):
    """Logits `[B, T, V]`, a step a token."""
    batch, length = tokens_BT.shape
    rows_T = jnp.arange(length, dtype=jnp.int32)
    period = len(model.period)
    stacks = params["periods"]
    layers = [jax.tree.map(lambda w: w[i // period], stacks[f"layer_{i % period}"]) for i in range(model.num_layers)]  # noqa: B023

    def step(kept, token_B, at):
        number, grown = itertools.count(), list(kept)
        info = TokenInfo(*(jnp.full((batch, 1), value, jnp.int32) for value in (at, 1, at)))
        everywhere = lambda row_T: jnp.broadcast_to(row_T, (batch, length)).astype(jnp.int32)
        there = TokenInfo(everywhere(rows_T), everywhere(jnp.where(rows_T <= at, 1, PAD_SEGMENT)), everywhere(rows_T))

        def keeping(q, k, v, q_info, k_info, mask, *, scale, slopes, impl, context):
            i = next(number)
            grown[i] = [jax.lax.dynamic_update_slice_in_dim(old, new, at, 1) for old, new in zip(kept[i], (k, v))]
            return attend(q, *grown[i], q_info, there, mask, scale=scale, slopes=slopes, impl="reference")

        monkeypatch.setattr(self_attention, "attend_sharded", keeping)
        x_BTD = params["embedding"][token_B][:, None]
        for layer, weights in zip(model.layers, layers, strict=True):
            x_BTD = DecoderLayer(model, layer).apply({"params": weights}, x_BTD, info)
        norm = Norm(model.norm, model.norm_eps, model.precision)
        hidden_BTD = norm.apply({"params": params["final_norm"]}, x_BTD) * model.logit_scale
        w_DV = params["embedding"].T if model.output_head == "tied" else params["head"]
        return grown, jnp.einsum("BTD,DV->BTV", hidden_BTD, w_DV)[:, 0]

    step = jax.jit(step, donate_argnums=0)
    kept = [[jnp.zeros((batch, length, model.num_kv_heads, model.head_dim)) for _ in "kv"] for _ in model.layers]
    found = []
    for at in range(length):
        kept, scores = step(kept, tokens_BT[:, at], jnp.int32(at))
        found.append(np.asarray(scores))
    return np.stack(found, axis=1)


@pytest.mark.parametrize("name", ["llama4_dense", "llama4_moe_interleave2", "cohere2"])
def test_token_by_token_is_one_forward_pass(name, tmp_path, monkeypatch):
    for file in ("config.json", "model.safetensors"):
        shutil.copyfile(GOLDEN / name / file, tmp_path / file)
    with np.load(GOLDEN / name / "golden.npz") as golden:
        tokens, original = golden["main/input_ids"], golden["main/logits"]
    found = read_source(tmp_path)
    chunks = [layer.mask.size for layer in found.model.layers if isinstance(layer.mask, Chunked)]
    assert tokens.shape[1] > 3 * max(chunks, default=0)
    whole = jax.jit(lambda p, t: logits(found.model, p, t, TokenInfo.single(*t.shape)))(found.params, tokens)
    steps = one_by_one(found.model, jax.device_put(found.params), tokens, monkeypatch)
    assert np.abs(steps - np.asarray(whole)).max() < 1e-4
    assert np.abs(steps - original).max() < 2e-4
