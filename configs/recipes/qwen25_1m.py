"""Qwen2.5-1M: 64k, 128k, 256k, each with its own base; then four times as far without training, by dual chunks.

    irope import Qwen2.5-7B runs/qwen25-7b
    irope show  --config=configs/recipes/qwen25_1m.py --devices=128
    irope train --config=configs/recipes/qwen25_1m.py:imported
    irope train --config=configs/recipes/qwen25_1m.py:tiny
    irope eval runs/recipes/qwen25_1m --only=passkey --config.evals.1.lengths="(1048576,)" \
--config.model.pattern.0.position="{'kind': 'dual_chunk', 'chunk': 163840, 'farthest': 196608, \
'rope': {'theta': 1e7}}"

Qwen2.5-1M Technical Report, arXiv 2501.15383: five stages, of which the first two (4k, and 32k with the base from 1e4
to 1e6) are those of Qwen2.5 itself, which this starts from; then 65,536 with base 1e6, 131,072 with 5e6, 262,144 with
1e7. In each 75 % of the text has the full length and 25 % is shorter; beside natural text there are tasks that need far
tokens (fill in the middle, retrieval by keyword and position, paragraphs to put in order): put them into
`data/qwen_whole_*`. Not published, and chosen here: tokens of a stage, batch and rate. On 128 chips.
Known result, 14B, RULER at 128k after 32k, 64k, 128k, 256k: 37.6, 56.0, 83.8, 87.6; with dual chunks 1M is read.
The report's dual chunks also sharpen attention as YaRN does (`temperature` of a layer here).
"""

from ml_collections import ConfigDict
from recipe_parts import MIXED, QWEN25, evaluations, parts, sized

THETAS = {65_536: 1e6, 131_072: 5e6, 262_144: 1e7}
BATCH, TOKENS = 4_194_304, 10_000_000_000


def mixture(length: int) -> tuple:
    return parts(**{f"qwen_whole_{length // 1024}k": 75}, qwen_shorter=25)


def stage(length: int) -> dict:
    context = length // 16_384
    return dict(
        name=f"{length // 1024}k",
        tokens=TOKENS,
        length=length,
        batch_tokens=BATCH,
        change={
            "model.pattern.*.position.theta": THETAS[length],
            "data.mixture": mixture(length),
            "evals.1.lengths": (32_768, *(known for known in THETAS if known <= length)),
            "mesh.context": context,
            "mesh.fsdp": 128 // context,
        },
    )


def get_config(size: str = "full") -> ConfigDict:
    layer = dict(
        position=dict(kind="rope", theta=1e6),
        mask=dict(kind="global"),
        ffn=dict(kind="swiglu", hidden_dim=18_944, chunk=4096),
    )
    config = ConfigDict()
    config.name = "recipes/qwen25_1m"
    config.description = "Qwen2.5 7B from 32k to 256k"
    config.model = dict(
        vocab_size=152_064,
        d_model=3584,
        num_layers=28,
        num_heads=28,
        num_kv_heads=4,
        head_dim=128,
        pattern=(layer,),
        attention_bias="qkv",
        norm_eps=1e-6,
        output_head="untied",
        remat="attention",
        precision=MIXED,
    )
    config.data = dict(
        seq_len=32_768,
        batch_size=128,
        mixture=mixture(65_536),
        packing=dict(kind="best_fit"),
    )
    optimizer = dict(learning_rate=1e-5, schedule=dict(kind="constant"), weight_decay=0.1)
    config.train = dict(steps=1, optimizer=optimizer, init_from="runs/qwen25-7b")
    config.mesh = dict(data=1, fsdp=128)
    config.evals = evaluations(32_768, (32_768,))
    config.stages = tuple(map(stage, THETAS))
    return sized(config, size, ids=QWEN25, divide=1024)
