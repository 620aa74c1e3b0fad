"""Llama 3: from 8k to 128k in six stages, each of which must be earned; then 40M tokens with the rate going to zero.

    irope import Meta-Llama-3-8B runs/llama3-8b
    irope show  --config=configs/recipes/llama3_long.py --devices=256
    irope train --config=configs/recipes/llama3_long.py:imported
    irope train --config=configs/recipes/llama3_long.py:tiny               # the same stages in a minute, on a CPU

The Llama 3 Herd of Models, arXiv 2407.21783, section 3.4.2 (said of the 405B, done to all): from 8k to 128k in six
stages, about 800B tokens; on to the next only when short evaluations have fully recovered and the needle is found at
every length so far; theta is 500,000 from the first day, so a stage changes nothing but the length. Batches of 16M
tokens, documents masked from one another, the sequence over 16 devices at 128k; at last 40M tokens with the rate
falling to zero. Not published, and chosen here: the lengths between, equal shares of the 800B (the most a stage may
take, its gate ends it earlier), the rate, a tolerance of half a percent. On 256 chips. Known result: the released
models find every needle at every depth and length to 128k (section 5.2.6).
"""

from ml_collections import ConfigDict
from recipe_parts import LLAMA3, MIXED, evaluations, parts, sized

LENGTHS = (16_384, 32_768, 49_152, 65_536, 98_304, 131_072)
ROWS = {16_384: 1024, 32_768: 512, 49_152: 320, 65_536: 256, 98_304: 160, 131_072: 128}  # 16M tokens, or 15.7M
CONTEXT = {16_384: 2, 32_768: 4, 49_152: 4, 65_536: 8, 98_304: 8, 131_072: 16}
CHIPS, TOKENS, RATE = 256, 800_000_000_000, 3e-5


def stage(length: int) -> dict:
    earned = (
        dict(evaluation="short", measure="nll_by_length", within=0.005),
        dict(evaluation="passkey", measure="accuracy", at_least=1.0),  # the mean over all lengths and depths
    )
    return dict(
        name=f"{length // 1024}k",
        tokens=TOKENS // len(LENGTHS),
        length=length,
        batch_tokens=ROWS[length] * length,
        change={
            "evals.1.lengths": (8192, *(known for known in LENGTHS if known <= length)),
            "mesh.context": CONTEXT[length],
            "mesh.fsdp": CHIPS // CONTEXT[length],
        },
        gate=dict(conditions=earned, every=250, least_steps=500, at_limit="stop"),
    )


def get_config(size: str = "full") -> ConfigDict:
    layer = dict(
        position=dict(kind="rope", theta=500_000.0),
        mask=dict(kind="global"),
        ffn=dict(kind="swiglu", hidden_dim=14_336, chunk=4096),
    )
    config = ConfigDict()
    config.name = "recipes/llama3_long"
    config.description = "Llama 3 8B from 8k to 128k in six gated stages"
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
        precision=MIXED,
    )
    config.data = dict(
        seq_len=8192,
        batch_size=2048,
        mixture=parts(llama3_long=50, llama3_short=50),
        packing=dict(kind="best_fit"),
    )
    optimizer = dict(learning_rate=RATE, schedule=dict(kind="constant"), weight_decay=0.1)
    config.train = dict(steps=1, optimizer=optimizer, init_from="runs/llama3-8b")
    config.mesh = dict(data=1, fsdp=CHIPS)
    config.evals = evaluations(8192, (8192,))
    anneal = dict(
        name="anneal",
        tokens=40_000_000,
        change={"train.optimizer.schedule": dict(kind="linear", final=0.0)},
    )
    config.stages = (*map(stage, LENGTHS), anneal)
    return sized(config, size, ids=LLAMA3, divide=512)
