"""Four layers of iRoPE at the widths of Llama 4 Scout, one row of 1,048,576 tokens cut over 64 chips in zigzag order.

    irope show --config=configs/long_context.py --devices=64                    # what lies and travels where
    python scripts/compile_step.py --config=configs/long_context.py --target=v5p:4x4x4
    irope train --config=configs/long_context.py                                # on 64 chips

The chunk-local layers send nothing: a device holds two runs of 8,192 tokens, each one chunk. The global layer turns one
ring; with `--config.model.context.far=auto` groups of 8 chips exchange heads first, for a fifth of the bytes.
Feed-forward layers are dense here.
"""

from ml_collections import ConfigDict

CHUNK = 8192


def get_config() -> ConfigDict:
    ffn = dict(kind="swiglu", hidden_dim=8192, chunk=4096)
    rope = dict(kind="rope", theta=500_000.0)
    local = dict(position=rope, mask=dict(kind="chunked", size=CHUNK), ffn=ffn, qk_norm="rms")
    far = dict(position=dict(kind="nope"), mask=dict(kind="global"), temperature=dict(kind="log_floor"), ffn=ffn)
    config = ConfigDict()
    config.name = "long_context"
    config.description = "4 layers of iRoPE, a million tokens over 64 chips"
    config.model = dict(
        vocab_size=272,
        d_model=5120,
        num_layers=4,
        num_heads=40,
        num_kv_heads=8,
        head_dim=128,
        pattern=(local, local, local, far),
        remat="attention",
        context=dict(layout="zigzag", far="ring"),
        precision=dict(params="float32", compute="bfloat16"),
    )
    config.data = dict(
        seq_len=1_048_576,
        batch_size=1,
        mixture=(dict(source=dict(kind="corpus", split="train")),),
        packing=dict(kind="best_fit", document_multiple=CHUNK),
    )
    config.train = dict(steps=100, optimizer=dict(learning_rate=3e-4), z_loss=1e-4)
    config.mesh = dict(data=1, context=64)
    return config
