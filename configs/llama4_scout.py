"""Llama 4 Scout, text only: 107,769,861,120 parameters, 17,172,894,720 of them for a token, 48 layers of 16 experts.

    irope show --config=configs/llama4_scout.py --devices=64       # what lies where; nothing is allocated
    irope import Llama-4-Scout-17B-16E runs/scout                  # weights, from the folder of the release
    irope train --config=configs/llama4_scout.py --config.train.init_from=runs/scout
    irope plan --config=configs/llama4_scout.py:1m --target=v5p:4x4x4   # one row of 1,048,576 tokens on 64 chips
    irope plan --config=configs/llama4_scout.py:10m --target=v5p:8x8x16 # one of 10,485,760 on 1,024

On 64 chips parameters, optimizer and gradients take 68.7 GB each (`irope show`); activations are not counted.
Three layers of four turn q and k (Llama 3 scaling, 16 x 8192) and see their chunk of 8192 tokens; the fourth sees all.
"""

from ml_collections import ConfigDict

CHUNK = 8192


def layers(ffns: tuple, scaling: dict, qk_norm: str) -> tuple:
    """The period of four with the feed-forward parts given for them."""
    rope = dict(kind="rope", theta=500_000.0, scaling=scaling, pairing="interleaved")
    local = dict(position=rope, mask=dict(kind="chunked", size=CHUNK), qk_norm=qk_norm)
    far = dict(position=dict(kind="nope"), mask=dict(kind="global"), temperature=dict(kind="log_floor"))
    return tuple(dict(layer, ffn=ffn) for layer, ffn in zip((local, local, local, far), ffns))


def mixture(num_experts: int) -> dict:
    shared = dict(kind="swiglu", hidden_dim=8192)
    return dict(kind="moe", num_experts=num_experts, hidden_dim=8192, router=dict(kind="sigmoid"), shared=shared)


ROWS = {"1m": (1_048_576, dict(context=64)), "10m": (10_485_760, dict(context=128, tensor=8))}
"""A single row and how its chips are laid out: no batch to cut, so the sequence is."""


def get_config(row: str = "") -> ConfigDict:
    scaling = dict(kind="llama3", factor=16.0, original_length=8192, low_freq_factor=1.0, high_freq_factor=1.0)
    config = ConfigDict()
    config.name = "llama4_scout"
    config.description = "Llama 4 Scout: 16 experts in every layer"
    config.model = dict(
        vocab_size=202_048,
        d_model=5120,
        num_layers=48,
        num_heads=40,
        num_kv_heads=8,
        head_dim=128,
        pattern=layers((mixture(16),) * 4, scaling, "rms"),
        output_head="untied",
        remat="attention",
        precision=dict(params="float32", compute="bfloat16"),
    )
    config.data = dict(
        seq_len=4 * CHUNK,
        batch_size=64,
        mixture=(dict(source=dict(kind="corpus", split="train")),),
        packing=dict(kind="best_fit", document_multiple=CHUNK),
    )
    config.train = dict(steps=100, optimizer=dict(learning_rate=1e-5), z_loss=1e-4)
    config.mesh = dict(data=1, fsdp=4, expert=16)
    if row:
        config.data.seq_len, config.mesh = ROWS[row][0], dict(data=1, **ROWS[row][1])
        config.data.batch_size = 1
        config.model.context = dict(layout="zigzag", far="ring")
    return config
