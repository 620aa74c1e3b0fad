"""The smallest run that has everything: two layers, six steps, both evaluations. For tests only."""

import json
from pathlib import Path

from irope_jax.core.config import to_dict
from irope_jax.experiment import Experiment, resolve

STEPS = 6
FACTS = dict(kind="needle", num_facts=(1, 2), num_queries=(1, 2), num_keys=8, num_values=8)


def values(*overrides: tuple[str, str]) -> dict:
    """Nested plain values, with `a.b = text` overrides."""
    ffn = dict(kind="swiglu", hidden_dim=16)
    local = dict(position=dict(kind="rope"), mask=dict(kind="chunked", size=8), ffn=ffn)
    far = dict(position=dict(kind="nope"), mask=dict(kind="global"), ffn=ffn)
    plain = dict(
        name="tiny",
        model=dict(
            vocab_size=288,
            d_model=16,
            num_layers=2,
            num_heads=2,
            num_kv_heads=2,
            head_dim=8,
            pattern=(local, far),
            attention="reference",
        ),
        data=dict(
            seq_len=32,
            batch_size=8,
            tokenizer=dict(kind="bytes", num_symbols=16),
            mixture=(dict(source=FACTS, lengths=(16, 33)),),
            packing=dict(kind="best_fit"),
        ),
        train=dict(
            steps=STEPS,
            optimizer=dict(learning_rate=1e-2, schedule=dict(kind="cosine", warmup=1)),
            log_every=1,
            eval_every=3,
        ),
        checkpoint=dict(every=2, keep=2),
        evals=(
            dict(kind="perplexity", lengths=(32,), tokens=256, batch_tokens=256),
            dict(kind="retrieval", task=FACTS, lengths=(32,), queries=16, facts=2, depth_bins=2, batch_tokens=256),
        ),
    )
    return to_dict(resolve(plain, overrides))


def experiment(*overrides: tuple[str, str]) -> Experiment:
    return resolve(values(*overrides))


def config_file(directory: Path) -> str:
    """A resolved config.json of it."""
    path = directory / "tiny.json"
    path.write_text(json.dumps(values()))
    return str(path)
