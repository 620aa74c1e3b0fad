"""DroPE: positions are taken out of every layer of a trained RoPE model, which is recalibrated at its own length.

    irope import Llama-2-7b-hf runs/llama2-7b
    irope show  --config=configs/recipes/drope.py --devices=64
    irope train --config=configs/recipes/drope.py:imported
    irope train --config=configs/recipes/drope.py:tiny        # its first stage is the RoPE model
    irope eval runs/recipes/drope --only=passkey --config.evals.1.lengths="(8192,)"      # twice its length, no training

Extending the Context of Pretrained LLMs by Dropping Their Positional Embeddings, arXiv 2512.12167, and its
`llama2_7b_drope.yaml`: 5,000 steps of 512 rows of 4,096 tokens (10B) at a peak of 1e-4, 100 steps of warm-up, cosine.
Fineweb-edu. On 64 chips. The longer recalibration norms queries and keys as well (here by a norm without weights) and
takes 15,000 steps (31B) at 3e-4: `--config.stages.0.steps=15000 --config.train.optimizer.learning_rate=3e-4
--config.model.pattern.0.qk_norm=rms`.
Known result, needles at twice the length without training there, by several queries, keys, values: 28.0, 41.6, 23.3
against 17.8, 0.5, 14.6 of YaRN and 0 of RoPE (0.5B, 2B of 16B tokens without positions); SmolLM-360M 74.9 against 48.3
of YaRN.
"""

from ml_collections import ConfigDict
from recipe_parts import LLAMA2, MIXED, evaluations, parts, sized

LENGTH = 4096


def get_config(size: str = "full") -> ConfigDict:
    layer = dict(
        position=dict(kind="rope", theta=10_000.0),
        mask=dict(kind="global"),
        ffn=dict(kind="swiglu", hidden_dim=11_008),
    )
    config = ConfigDict()
    config.name = "recipes/drope"
    config.description = "Llama 2 7B without positions, recalibrated"
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
        seq_len=LENGTH,
        batch_size=512,
        mixture=parts(fineweb_edu=100),
    )
    schedule = dict(kind="cosine", warmup=100, final=0.0)
    optimizer = dict(learning_rate=1e-4, schedule=schedule)
    config.train = dict(steps=5000, optimizer=optimizer, init_from="runs/llama2-7b")
    config.mesh = dict(data=1, fsdp=64)
    config.evals = evaluations(LENGTH, (LENGTH, 2 * LENGTH))
    drop = {"model.pattern.*.position": dict(kind="nope")}
    config.stages = (dict(name="recalibrate", steps=5000, length=LENGTH, batch_tokens=512 * LENGTH, change=drop),)
    return sized(config, size, ids=LLAMA2, divide=64, source=True)
