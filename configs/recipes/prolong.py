"""ProLong: Llama 3 8B Instruct to 64k and then 512k, with a base of its own for each and short texts in every batch.

    irope import Meta-Llama-3-8B-Instruct runs/llama3-8b-instruct
    irope show  --config=configs/recipes/prolong.py --devices=128
    irope train --config=configs/recipes/prolong.py:imported
    irope train --config=configs/recipes/prolong.py:tiny

How to Train Long-Context Language Models (Effectively), arXiv 2410.02660, and its `train_64K.sh`, `train_512K.sh`: 20B
tokens at 64k with base 8e6, then 20B at 512k with base 1.28e8, optimizer state kept; cosine to a tenth over each stage,
a tenth of it warm-up; documents masked from one another. 30 % repositories, 30 % books, 3 % textbooks, 37 % short
texts; in the second stage most long documents are still of 64k (`data/repos_64k` holds pieces of that length, which
rows of 512k pack). On 128 chips; the weights are 128 GB with their optimizer, a quarter of that at 512k on each.
Known result at 64k, mean of long tasks by base: 29.1 (5e5), 48.7 (4e6), 54.6 (8e6); with documents seeing one another
53.6. Then the authors tune on 1B tokens of UltraChat, short, and nothing else.
"""

from ml_collections import ConfigDict
from recipe_parts import LLAMA3, MIXED, evaluations, parts, sized

SHORT = dict(
    fineweb_edu=10, fineweb=10, stackexchange=4, wiki=4, tulu=3, arxiv=3, openwebmath=3, textbooks=3
)  # percent; textbooks are counted beside the 37 of the mix


def get_config(size: str = "full") -> ConfigDict:
    layer = dict(
        position=dict(kind="rope", theta=500_000.0),
        mask=dict(kind="global"),
        ffn=dict(kind="swiglu", hidden_dim=14_336, chunk=4096),
    )
    config = ConfigDict()
    config.name = "recipes/prolong"
    config.description = "ProLong: Llama 3 8B Instruct to 512k"
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
        seq_len=65_536,
        batch_size=64,
        mixture=parts(repos_64k=30, books_64k=30, **SHORT),
        packing=dict(kind="best_fit"),
    )
    schedule = dict(kind="cosine", final=0.1)
    optimizer = dict(learning_rate=1e-5, schedule=schedule, algorithm=dict(kind="adamw", b2=0.95), weight_decay=0.1)
    config.train = dict(steps=5000, optimizer=optimizer, init_from="runs/llama3-8b-instruct")
    config.mesh = dict(data=1, fsdp=32, context=4)
    config.evals = evaluations(8192, (8192, 65_536))
    config.stages = (
        dict(
            name="64k",
            steps=5000,
            length=65_536,
            batch_tokens=64 * 65_536,
            change={"model.pattern.*.position.theta": 8e6, "train.optimizer.schedule.warmup": 500},
        ),
        dict(
            name="512k",
            steps=2500,
            length=524_288,
            batch_tokens=16 * 524_288,
            change={
                "model.pattern.*.position.theta": 1.28e8,
                "train.optimizer.learning_rate": 5e-6,
                "train.optimizer.schedule.warmup": 250,
                "train.accumulate": 4,
                "data.mixture": parts(repos_512k=15, repos_64k=15, books_512k=5, books_64k=25, **SHORT),
                "evals.1.lengths": (8192, 65_536, 524_288),
                "mesh.fsdp": 4,
                "mesh.context": 32,
            },
        ),
    )
    return sized(config, size, ids=LLAMA3, divide=1024)
