"""An all-RoPE model of novels as bytes, trained at 256 tokens: what searches for longer contexts are tried on.

    irope train --config=configs/extend_tiny.py                               # a few minutes on two CPU cores
    irope search-rope --checkpoint=runs/extend_tiny --config=configs/search_rope.py:tiny

`extend_tiny.py:1` is the same with seed 1. Expect a validation loss near 1.44 nats a byte at 256 tokens; the unscaled
model is near 2.67 at 2,048.
"""

from ml_collections import ConfigDict

LENGTH = 256


def get_config(seed: str = "0") -> ConfigDict:
    layer = dict(
        position=dict(kind="rope", theta=10_000.0), mask=dict(kind="global"), ffn=dict(kind="swiglu", hidden_dim=384)
    )
    config = ConfigDict()
    config.name = "extend_tiny" if seed == "0" else f"extend_tiny_{seed}"
    config.description = f"4 layers with RoPE, trained on bytes at {LENGTH} tokens"
    config.seed = int(seed)
    config.model = dict(
        vocab_size=272, d_model=128, num_layers=4, num_heads=4, num_kv_heads=4, head_dim=32, pattern=(layer,)
    )
    config.data = dict(
        seq_len=LENGTH, batch_size=8, mixture=(dict(source=dict(kind="corpus", split="train")),), seed=int(seed)
    )
    config.train = dict(
        steps=1200,
        optimizer=dict(
            learning_rate=3e-3, schedule=dict(kind="cosine", warmup=50), algorithm=dict(kind="adamw", b2=0.98)
        ),
    )
    config.checkpoint = dict(every=400)
    config.evals = (dict(kind="perplexity", lengths=(LENGTH, 2048), tokens=65_536),)
    return config
