"""SmolLM3: a model of RoPE and, every fourth layer, NoPE from 4k to 32k and 64k by larger bases alone.

    irope import SmolLM3-3B-4k runs/smollm3-3b-4k       # end of stage 3, from HuggingFaceTB/SmolLM3-3B-checkpoints
    irope show  --config=configs/recipes/smollm3.py --devices=48
    irope train --config=configs/recipes/smollm3.py:imported
    irope train --config=configs/recipes/smollm3.py:tiny

SmolLM3, https://huggingface.co/blog/smollm3, and its `long_context_4k_to_32k.yaml`, `long_context_32k_to_64.yaml`:
20,000 steps of 72 rows of 32k with base 2e6 (the blog says 1.5e6), 22,000 steps of 36 rows of 64k with base 5e6 and a
fresh optimizer: 47B and 52B tokens, about 50B each in the blog. Peak rate 2e-5, 1,000 steps of warm-up, cosine to zero;
no weight decay on the embedding; every layer sees all of its document, and no other. The mix of the decay stage, with
more mathematics, code and reasoning: more long texts did not help. On 48 chips (theirs: 12 replicas, sequence over 4).
Known result: 128k is read with YaRN x2 on top; RULER fell with preference tuning and came back by merging 0.9 of the
tuned weights with 0.1 of those before.
"""

from ml_collections import ConfigDict
from recipe_parts import LLAMA3, MIXED, evaluations, parts, sized


def get_config(size: str = "full") -> ConfigDict:
    ffn = dict(kind="swiglu", hidden_dim=11_008, chunk=4096)
    turns = dict(position=dict(kind="rope", theta=50_000.0), mask=dict(kind="global"), ffn=ffn)
    plain = dict(position=dict(kind="nope"), mask=dict(kind="global"), ffn=ffn)
    config = ConfigDict()
    config.name = "recipes/smollm3"
    config.description = "SmolLM3 3B from 4k to 64k"
    config.model = dict(
        vocab_size=128_256,
        d_model=2048,
        num_layers=36,
        num_heads=16,
        num_kv_heads=4,
        head_dim=128,
        pattern=(turns, turns, turns, plain),
        norm_eps=1e-6,
        remat="attention",
        precision=MIXED,
    )
    config.data = dict(
        seq_len=4096,
        batch_size=576,
        mixture=parts(smollm3_web=50, smollm3_code=25, smollm3_math=15, smollm3_reasoning=10),
        packing=dict(kind="best_fit"),
    )
    optimizer = dict(
        learning_rate=2e-5,
        schedule=dict(kind="cosine", warmup=1000, final=0.0),
        algorithm=dict(kind="adamw", b2=0.95),
        weight_decay=0.1,
        no_decay=("*scale", "embedding"),
    )
    config.train = dict(steps=20_000, accumulate=3, optimizer=optimizer, init_from="runs/smollm3-3b-4k")
    config.mesh = dict(data=3, fsdp=4, context=4)
    config.evals = evaluations(4096, (4096, 32_768))
    config.stages = (
        dict(
            name="32k",
            steps=20_000,
            length=32_768,
            batch_tokens=72 * 32_768,
            change={"model.pattern.*.position.theta": 2e6},
        ),
        dict(
            name="64k",
            steps=22_000,
            length=65_536,
            batch_tokens=36 * 65_536,
            change={"model.pattern.*.position.theta": 5e6, "evals.1.lengths": (4096, 32_768, 65_536)},
            optimizer_state="reset",
        ),
    )
    return sized(config, size, ids=LLAMA3, divide=256)
