"""What number formats of the cache cost a trained model, in bytes and in logits.

    python scripts/fetch_assets.py smollm2
    python scripts/check_cache.py --checkpoint=assets/smollm2-135m [--tokens 512]

Reads the beginning of *Moby-Dick* in pieces of 128 tokens with the cache in each format, and compares the logits of
every token with those of one forward pass: root mean square of the difference over that of the logits, and the
divergence of the distributions of the next token (Kullback-Leibler, nats a token). The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from irope_jax.core.types import TokenInfo
from irope_jax.data.sources import Corpus
from irope_jax.experiment import resolve, run_config
from irope_jax.model.cache import CacheSpec, cache_bytes, new_cache
from irope_jax.model.decoder import cached_hidden_states, hidden_states
from irope_jax.sharding.mesh import MeshConfig, make_mesh
from irope_jax.train.state import load_params

PIECE = 128
FORMATS = (("float32", None), ("bfloat16", None), ("int8", None), ("int8", 64), ("int4", None))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, metavar="RUN", help="run directory")
    parser.add_argument("--tokens", type=int, default=512, help=f"how many, a multiple of {PIECE} (default: 512)")
    args = parser.parse_args()
    experiment = resolve(run_config(Path(args.checkpoint)))
    model, source = experiment.model, Corpus("test")
    text = next(source.records(source.files()[0]))[: 16 * args.tokens]
    tokens = jnp.asarray(experiment.data.tokenizer.encode(text)[None, : args.tokens // PIECE * PIECE])
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])

    @jax.jit
    def whole(params):
        hidden, w = hidden_states(model, params, tokens, TokenInfo.single(*tokens.shape))
        return hidden @ w

    @jax.jit
    def piece(params, cache, tokens):
        hidden, w, cache = cached_hidden_states(model, params, tokens, cache.next_info(jnp.ones(tokens.shape)), cache)
        return hidden @ w, cache

    table = Table("numbers", "a scale for", "MB", "error of logits", "divergence, nats")
    found = {}
    with jax.set_mesh(mesh):
        params, _ = load_params(args.checkpoint, model, mesh)
        want = np.asarray(whole(params))
        sure = np.asarray(jax.nn.log_softmax(want))
        for numbers, block in FORMATS:
            spec = CacheSpec(1, tokens.shape[1], numbers, block)
            cache, parts = new_cache(model, spec), []
            for at in range(0, tokens.shape[1], PIECE):
                logits, cache = piece(params, cache, tokens[:, at : at + PIECE])
                parts.append(np.asarray(logits))
            got = np.concatenate(parts, axis=1)
            error = float(np.sqrt(np.square(got - want).mean() / np.square(want).mean()))
            divergence = float((np.exp(sure) * (sure - np.asarray(jax.nn.log_softmax(got)))).sum(-1).mean())
            size = sum(kind.total for kind in cache_bytes(model, spec)) / 1e6
            scale = "" if "int" not in numbers else f"{spec.shared(model)} numbers"
            table.add_row(numbers, scale, f"{size:.1f}", f"{error:.3%}", f"{divergence:.2g}")
            found[f"{numbers}/{scale}" if scale else numbers] = error
    Console().print(table)
    print(json.dumps({"errors": found}))


if __name__ == "__main__":
    main()
