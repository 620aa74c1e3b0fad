"""What a long context costs by its length: iRoPE beside all-RoPE of the same size, read and decoded here.

    irope eval --config=configs/scaling.py         # most of the time goes to all-RoPE at 256k
    irope report runs/scaling

Nothing is trained: time and memory do not depend on what weights say. Eight layers at Llama 4's proportions of local to
global ones (chunks of 512 here); the all-RoPE model has the same parameters. Texts are read in pieces of 4,096 tokens
with a KV cache of float32, then tokens follow one by one. The last layer attends for the last token only, in both
models: of the two global layers of the iRoPE model one is read in full, of the eight of the other seven.
"""

from ml_collections import ConfigDict

LENGTHS = tuple(1024 * n for n in (8, 16, 32, 64, 128, 256))


def get_config() -> ConfigDict:
    ffn = dict(kind="swiglu", hidden_dim=128)
    rope = dict(kind="rope", theta=500_000.0)
    local = dict(position=rope, mask=dict(kind="chunked", size=512), ffn=ffn)
    far = dict(position=dict(kind="nope"), mask=dict(kind="global"), temperature=dict(kind="log_floor"), ffn=ffn)
    config = ConfigDict()
    config.name = "scaling"
    config.description = "time and memory of reading and decoding by length, iRoPE and all-RoPE"
    config.model = dict(
        vocab_size=288,
        d_model=64,
        num_layers=8,
        num_heads=2,
        num_kv_heads=1,
        head_dim=16,
        pattern=(local, local, local, far),
    )
    config.data = dict(seq_len=8192, batch_size=1, tokenizer=dict(kind="bytes"))
    config.train = dict(steps=1)
    all_rope = (dict(position=rope, mask=dict(kind="global"), ffn=ffn),)
    config.evals = (
        dict(kind="cost", name="iRoPE", lengths=LENGTHS, numbers="float32"),
        dict(kind="cost", name="all RoPE", lengths=LENGTHS, numbers="float32", pattern=all_rope),
    )
    return config
