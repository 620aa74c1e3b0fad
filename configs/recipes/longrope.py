"""LongRoPE: factors are searched, the model is tuned with them, factors for twice that are searched, and so to 2M.

    irope import Llama-2-7b-hf runs/llama2-7b
    bash scripts/recipes/longrope.sh full               # all of it on 64 chips: three searches, two trainings, 8k again
    bash scripts/recipes/longrope.sh                    # the same of a tiny model, some minutes on a CPU
    irope train --config=configs/recipes/longrope.py:tiny

LongRoPE, arXiv 2402.13753, LLaMA2 7B: search factors for 128k, tune 400 steps at 128k; go over to factors for 256k, 600
steps at 256k; search factors for 2048k, eight times as far, without tuning; search factors for 4k and 8k with a smaller
limit, which short texts turn by. Peak rate 2e-5 on a line to zero, 32 rows, RedPajama in pieces of the whole length.
Known result: Books3 perplexity 7.08 at 2048k (YaRN 8.27, PI 20.17), passkey above 90 % from 4k to 2048k; short texts
lose some (MMLU 46.6 -> 43.4); the last search brings Proof-pile at 4k from 4.16 to 3.71.

What stands after the colon is `SIZE[,STAGE[,FACTORS]]`: both stages in one run, or one of them (`128k`, `256k`; `base`
is the tiny model they start from), with the factors.json of a search. Without one every pair is stretched alike, which
is where searches begin too (PI). The attention factor is 1 throughout (`attention_policy` none), so that factors for
short and for long texts go into one scaling.
"""

import json
from pathlib import Path

from ml_collections import ConfigDict
from recipe_parts import LLAMA2, MIXED, evaluations, parts, sized

TRAINED, PAIRS = 4096, 64
STEPS = {131_072: 400, 262_144: 600}
CONTEXT = {131_072: 8, 262_144: 16}
SCALING = "model.pattern.*.position.scaling"


def stage(length: int) -> dict:
    context, stretch = CONTEXT[length], length / TRAINED
    alike = dict(factor=stretch, long_factor=(stretch,) * PAIRS, attention_policy="none")
    return dict(
        name=f"{length // 1024}k",
        steps=STEPS[length],
        length=length,
        batch_tokens=32 * length,
        change={
            SCALING: dict(kind="longrope", original_length=TRAINED, **alike),
            "train.accumulate": context // 2,  # one row at a time on a device
            "evals.1.lengths": (TRAINED, *(known for known in STEPS if known <= length)),
            "mesh.context": context,
            "mesh.fsdp": 64 // context,
        },
    )


def get_config(size: str = "full") -> ConfigDict:
    size, name, file = [*size.split(","), "", ""][:3]
    layer = dict(
        position=dict(kind="rope", theta=10_000.0),
        mask=dict(kind="global"),
        ffn=dict(kind="swiglu", hidden_dim=11_008, chunk=4096),
    )
    config = ConfigDict()
    config.name = "recipes/longrope"
    config.description = "LongRoPE: Llama 2 7B tuned at 128k and 256k"
    config.model = dict(
        vocab_size=32_000,
        d_model=4096,
        num_layers=32,
        num_heads=32,
        num_kv_heads=32,
        head_dim=128,
        pattern=(layer,),
        output_head="untied",
        remat="attention",
        precision=MIXED,
    )
    config.data = dict(
        seq_len=TRAINED,
        batch_size=32,
        mixture=parts(redpajama=100),
    )
    optimizer = dict(learning_rate=2e-5, schedule=dict(kind="linear", final=0.0))
    config.train = dict(steps=400, optimizer=optimizer, init_from="runs/llama2-7b")
    config.mesh = dict(data=1, fsdp=2, context=32)  # of searches, to 2048k; stages have their own
    config.evals = evaluations(TRAINED, (TRAINED,))
    if name not in ("", "base", "128k", "256k"):
        raise ValueError(f"unknown stage {name!r}; choose one of: base, 128k, 256k")
    config.stages = tuple(stage(length) for length in STEPS if name in ("", f"{length // 1024}k"))
    config = sized(config, size, ids=LLAMA2, divide=512, source=name in ("", "base"))
    if file:
        config.stages[0]["change"][SCALING] = json.loads(Path(file).read_text(encoding="utf-8"))
    return config
