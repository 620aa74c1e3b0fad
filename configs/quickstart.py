"""What iRoPE buys, in minutes on two CPU cores: trained on 128 tokens, judged up to 8,192.

    irope train --config=configs/quickstart.py:irope      # from scratch
    irope train --config=configs/quickstart.py:rope       # the all-RoPE twin, started from the first run's weights
    irope report runs/quickstart/irope runs/quickstart/rope

(`bash scripts/quickstart.sh` does all three.) Text is Jane Austen's novels as bytes, with facts `SET key value` let in
among the letters and questions `GET key` whose answer is the value. The twin has the same parameters with RoPE and a
global mask in every layer. From scratch it does not learn to answer in this budget, so it starts from the iRoPE weights
and is trained until it is right at 128 tokens: what the picture compares is what each does beyond that.
"""

import math

from ml_collections import ConfigDict

LENGTH = 128
FACTS = dict(kind="needle", haystack=dict(kind="text", source=dict(kind="corpus", split="train")))
HELD_OUT = dict(kind="text", source=dict(kind="corpus", split="validation"))


def get_config(arm: str = "irope") -> ConfigDict:
    ffn = dict(kind="swiglu", hidden_dim=256)
    rope = dict(kind="rope", theta=10_000.0)
    local = dict(position=rope, mask=dict(kind="chunked", size=LENGTH // 4), ffn=ffn)
    # floor_scale = L and attn_scale = 1 / ln L make Llama 4's temperature log-n scaling for training length L.
    log_n = dict(kind="log_floor", floor_scale=LENGTH, attn_scale=1 / math.log(LENGTH))
    far = dict(position=dict(kind="nope"), mask=dict(kind="global"), temperature=log_n, ffn=ffn)
    patterns = {
        "irope": (local, local, local, far),
        "rope": (dict(position=rope, mask=dict(kind="global"), ffn=ffn),),
    }
    if arm not in patterns:
        raise ValueError(f"unknown arm {arm!r}; choose one of: {', '.join(patterns)}")
    scratch = arm == "irope"
    config = ConfigDict()
    config.name = f"quickstart/{arm}"
    config.description = (
        "three chunk-local RoPE layers and one global NoPE layer with log-n temperature; trained from scratch"
        if scratch
        else "RoPE and a global mask in every layer; started from the iRoPE weights, then trained at the same length"
    )
    config.model = dict(
        vocab_size=400,
        d_model=128,
        num_layers=4,
        num_heads=4,
        num_kv_heads=4,
        head_dim=32,
        pattern=patterns[arm],
        output_head="untied",
        init_std=0.08,
    )
    config.data = dict(
        seq_len=LENGTH,
        batch_size=32,
        tokenizer=dict(kind="bytes", num_symbols=128),
        mixture=(
            dict(source=FACTS | dict(num_facts=(1, 8), num_queries=(4, 12), answer_weight=2.0), weight=0.8),
            dict(source=dict(kind="corpus", split="train"), weight=0.2),
        ),
        packing=dict(kind="one_per_row"),
    )
    config.train = dict(
        steps=800 if scratch else 300,
        optimizer=dict(
            learning_rate=3e-3 if scratch else 1e-3,
            schedule=dict(kind="cosine", warmup=50, final=0.05),
            b2=0.98,
            weight_decay=0.05,
        ),
        init_from=None if scratch else "runs/quickstart/irope",
    )
    config.checkpoint = dict(every=200)
    lengths = tuple(LENGTH * times for times in (1, 4, 16, 64))
    config.evals = (
        dict(kind="retrieval", task=FACTS | dict(haystack=HELD_OUT), lengths=lengths, queries=512),
        dict(kind="perplexity", lengths=lengths, tokens=131_072),
    )
    return config
