"""The models that training speed is measured with on a CPU: eight layers, about eight million parameters.

    python scripts/bench_train.py                                        # both, at 1,024 and 4,096 tokens
    python scripts/bench_train.py --config=configs/bench_8m.py:irope     # one of them
    irope train --config=configs/bench_8m.py:irope                       # trains as well

`global` sees everything with RoPE in every layer, as a Llama does; `irope` has three layers of RoPE in chunks of 512
and a global one without positions, twice. Every batch has 4,096 tokens.
"""

from ml_collections import ConfigDict

ARMS = ("global", "irope")


def get_config(arm: str = "global") -> ConfigDict:
    if arm not in ARMS:
        raise ValueError(f"unknown arm {arm!r}; choose one of: {', '.join(ARMS)}")
    ffn = dict(kind="swiglu", hidden_dim=1024)
    whole = dict(position=dict(kind="rope"), mask=dict(kind="global"), ffn=ffn)
    local = whole | dict(mask=dict(kind="chunked", size=512))
    far = whole | dict(position=dict(kind="nope"), temperature=dict(kind="log_floor", floor_scale=512))
    config = ConfigDict()
    config.name = f"bench_8m/{arm}"
    config.model = dict(
        vocab_size=512,
        d_model=256,
        num_layers=8,
        num_heads=8,
        num_kv_heads=2,
        head_dim=32,
        pattern=(whole,) if arm == "global" else (local, local, local, far),
    )
    config.data = dict(
        seq_len=4096,
        batch_size=1,
        tokenizer=dict(kind="bytes", num_symbols=128),
        mixture=(dict(source=dict(kind="corpus", split="train")),),
        packing=dict(kind="one_per_row"),
    )
    config.train = dict(steps=100, optimizer=dict(learning_rate=1e-3, schedule=dict(kind="constant", warmup=10)))
    return config
