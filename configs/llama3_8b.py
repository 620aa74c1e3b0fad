"""Llama 3.1 8B: 8,030,261,248 parameters, 32 layers that all see everything.

    irope plan --config=configs/llama3_8b.py --target=v5p:4x4x8               # 8 rows of 131,072 tokens on 128 chips
    irope plan --config=configs/llama3_8b.py --target=v5e:16x16 --mesh=auto
    irope import Llama-3.1-8B runs/llama3_8b                                  # weights, from the folder of the release

The dense, all-global model to hold iRoPE against.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    scaling = dict(kind="llama3", factor=8.0, original_length=8192, low_freq_factor=1.0, high_freq_factor=4.0)
    layer = dict(
        position=dict(kind="rope", theta=500_000.0, scaling=scaling),
        mask=dict(kind="global"),
        ffn=dict(kind="swiglu", hidden_dim=14_336),
    )
    config = ConfigDict()
    config.name = "llama3_8b"
    config.description = "Llama 3.1 8B, 131,072 tokens a row"
    config.model = dict(
        vocab_size=128_256,
        d_model=4096,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        pattern=(layer,),
        output_head="untied",
        remat="attention",
        context=dict(layout="zigzag", far="ring"),
        precision=dict(params="float32", compute="bfloat16"),
    )
    config.data = dict(
        seq_len=131_072,
        batch_size=8,
        mixture=(dict(source=dict(kind="corpus", split="train")),),
        packing=dict(kind="best_fit"),
    )
    config.train = dict(steps=100, optimizer=dict(learning_rate=1e-5), z_loss=1e-4)
    config.mesh = dict(data=1, fsdp=8, context=16)
    return config
