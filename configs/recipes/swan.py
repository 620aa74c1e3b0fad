"""SWAN: a RoPE model becomes one of global NoPE layers and RoPE layers that see 512 tokens, and reads far beyond 32k.

    irope import Meta-Llama-3-8B runs/llama3-8b
    irope show  --config=configs/recipes/swan.py --devices=64
    irope train --config=configs/recipes/swan.py:imported
    irope train --config=configs/recipes/swan.py:tiny         # its first stage is the RoPE model

SWAN-GPT, arXiv 2504.08719: the first layer of every four loses its positions and sees everything, the other three keep
theirs and see a window. The parameters stay what they were. Of a RoPE model of 8B trained on 15T tokens, 315B more at
32k make one: 300B at 1e-5, then 15B down to 5e-8 on a line. Reading, not training, queries of the global layers grow
with the logarithm of what they see; the paper fits that curve, here it is ln n / ln 32768 (`log_n`). The authors' 8B is
their own; widths here are Llama 3's, which anybody can import; batch chosen here. On 64 chips.
Known result: short tasks 71.55 -> 70.95; RULER 77.8 at 128k, 73.2 at 256k, 64.6 at 512k, 60.1 at 2M, 64 times the
training length; without the growing queries retrieval is gone at 8 times (0.957 -> 0.171, small models).
"""

from ml_collections import ConfigDict
from recipe_parts import LLAMA3, MIXED, evaluations, parts, sized

LENGTH, WINDOW = 32_768, 512
BATCH = 4_194_304
GROWS = dict(kind="log_n", train_length=LENGTH, when="eval")


def get_config(size: str = "full") -> ConfigDict:
    layer = dict(
        position=dict(kind="rope", theta=500_000.0),
        mask=dict(kind="global"),
        ffn=dict(kind="swiglu", hidden_dim=14_336, chunk=4096),
    )
    config = ConfigDict()
    config.name = "recipes/swan"
    config.description = "Llama 3 8B made into global NoPE layers and RoPE layers of 512 tokens"
    config.model = dict(
        vocab_size=128_256,
        d_model=4096,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        pattern=(layer,) * 4,
        output_head="untied",
        remat="attention",
        precision=MIXED,
    )
    config.data = dict(
        seq_len=LENGTH,
        batch_size=BATCH // LENGTH,
        mixture=parts(swan=100),
        packing=dict(kind="best_fit"),
    )
    optimizer = dict(learning_rate=1e-5, schedule=dict(kind="constant"), weight_decay=0.1)
    config.train = dict(steps=1, optimizer=optimizer, init_from="runs/llama3-8b")
    config.mesh = dict(data=1, fsdp=64)
    config.evals = evaluations(8192, (LENGTH, 4 * LENGTH))
    local = {f"model.pattern.{i}.mask": dict(kind="sliding", size=WINDOW) for i in (1, 2, 3)}
    config.stages = (
        dict(
            name="convert",
            tokens=300_000_000_000,
            length=LENGTH,
            batch_tokens=BATCH,
            change={"model.pattern.0.position": dict(kind="nope"), "model.pattern.0.temperature": GROWS, **local},
        ),
        dict(
            name="decay",
            tokens=15_000_000_000,
            change={"train.optimizer.schedule": dict(kind="linear", final=0.005)},
        ),
    )
    return sized(config, size, ids=LLAMA3, divide=128, source=True)
