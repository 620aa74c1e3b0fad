"""Original implementations, decoded by us token by token: four families whose layers keep different things."""

import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from irope_jax.core.numerics import assert_close
from irope_jax.model.cache import CacheSpec, new_cache
from irope_jax.model.decoder import cached_hidden_states
from irope_jax.transfer import read_source

GOLDEN = Path(__file__).parent.parent / "golden" / "families"


@pytest.mark.parametrize("name", ["llama4_dense", "llama4_moe", "smollm3", "cohere2"])
def test_the_golden_logits_token_by_token(name, tmp_path):
    """160 tokens: five chunks of Llama 4, six windows of Cohere 2. The original's own noise is 6e-5."""
    for file in ("config.json", "model.safetensors"):
        shutil.copyfile(GOLDEN / name / file, tmp_path / file)
    with np.load(GOLDEN / name / "golden.npz") as golden:
        tokens, want = golden["main/input_ids"], golden["main/logits"]
    found = read_source(tmp_path)

    @jax.jit
    def run(params, cache):
        def step(cache, token_B):
            info = cache.next_info(jnp.ones((len(tokens), 1)))
            hidden, w, cache = cached_hidden_states(found.model, params, token_B[:, None], info, cache)
            return cache, hidden[:, 0] @ w

        return jax.lax.scan(step, cache, jnp.asarray(tokens.T, jnp.int32))[1]

    scores = run(found.params, new_cache(found.model, CacheSpec(len(tokens), tokens.shape[1], "float32")))
    assert_close(np.moveaxis(scores, 0, 1), want, rtol=0, atol=2e-4)
