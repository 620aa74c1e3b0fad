"""What iRoPE buys, in minutes on two CPU cores: trained on 128 tokens, judged up to 8,192.

    irope train --config=configs/quickstart.py:recall     # first lesson: pairs of symbols at 32 tokens, no text
    irope train --config=configs/quickstart.py:irope      # the model: novels and facts at 128 tokens
    irope train --config=configs/quickstart.py:rope       # its all-RoPE twin, started from the same weights
    irope report runs/quickstart/irope runs/quickstart/rope

(`bash scripts/quickstart.sh` does all four.) Text is Jane Austen's novels as bytes, with facts `SET key value` let in
among the letters and questions `GET key` whose answer is the value. The first lesson is a length curriculum: on short
rows of nothing but pairs a model finds in a few hundred steps how to look a value up, which takes far longer among
letters. The twin has the same parameters with RoPE and a global mask in every layer; it starts from the trained iRoPE
weights and is trained on until it is right at 128 tokens. What the picture compares is what each does beyond that.
"""

import math

from ml_collections import ConfigDict

LENGTH = 128
SHORT = 32
FACTS = dict(kind="needle", haystack=dict(kind="text", source=dict(kind="corpus", split="train")))
HELD_OUT = dict(kind="text", source=dict(kind="corpus", split="validation"))
ARMS = {
    "recall": "first lesson of the iRoPE model: pairs of symbols at 32 tokens, from scratch",
    "irope": "three chunk-local RoPE layers and one global NoPE layer with log-n temperature; trained from scratch, "
    "first on pairs of symbols at 32 tokens (quickstart/recall), then on text and facts at 128",
    "rope": "RoPE and a global mask in every layer; started from the trained iRoPE weights, then trained on text and "
    "facts at 128 tokens",
}


def layers(arm: str, length: int) -> tuple:
    ffn = dict(kind="swiglu", hidden_dim=128)
    rope = dict(kind="rope", theta=10_000.0)
    if arm == "rope":
        return (dict(position=rope, mask=dict(kind="global"), ffn=ffn),)
    chunk = 16 if arm == "recall" else length // 4
    local = dict(position=rope, mask=dict(kind="chunked", size=chunk), ffn=ffn)
    # floor_scale = L and attn_scale = 1 / ln L make Llama 4's temperature log-n scaling for training length L.
    log_n = dict(kind="log_floor", floor_scale=LENGTH, attn_scale=1 / math.log(LENGTH))
    far = dict(position=dict(kind="nope"), mask=dict(kind="global"), temperature=log_n, ffn=ffn)
    return (local, local, local, far)


def get_config(arm: str = "irope") -> ConfigDict:
    if arm not in ARMS:
        raise ValueError(f"unknown arm {arm!r}; choose one of: {', '.join(ARMS)}")
    length = SHORT if arm == "recall" else LENGTH
    config = ConfigDict()
    config.name = f"quickstart/{arm}"
    config.description = ARMS[arm]
    config.model = dict(
        vocab_size=400,
        d_model=64,
        num_layers=4,
        num_heads=2,
        num_kv_heads=2,
        head_dim=32,
        pattern=layers(arm, length),
        output_head="untied",
        init_std=0.1,
        embedding_init_std=0.3,
        residual_init_std=0.0035,  # near zero: at first the layers between look-up and binding stand aside
    )
    facts = FACTS | dict(num_facts=(1, 8), num_queries=(3, 16), answer_weight=2.5)
    text = dict(source=dict(kind="corpus", split="train"), weight=0.2)
    pairs = dict(kind="multi_query_recall", num_pairs=(2, 7))
    config.data = dict(
        seq_len=length,
        batch_size=4096 // length,
        tokenizer=dict(kind="bytes", num_symbols=128),
        mixture=(dict(source=pairs),) if arm == "recall" else (dict(source=facts, weight=0.8), text),
        packing=dict(kind="one_per_row"),
    )
    config.train = dict(
        steps={"recall": 500, "irope": 800, "rope": 300}[arm],
        optimizer=dict(
            learning_rate={"recall": 3e-3, "irope": 2e-3, "rope": 1e-3}[arm],
            schedule=dict(kind="cosine", warmup=50, final=0.3 if arm == "recall" else 0.05),
            algorithm=dict(kind="adamw", b2=0.98),
            weight_decay=0.05,
        ),
        init_from={"recall": None, "irope": "runs/quickstart/recall", "rope": "runs/quickstart/irope"}[arm],
    )
    config.checkpoint = dict(every=200)
    lengths = (SHORT, LENGTH) if arm == "recall" else tuple(LENGTH * times for times in (1, 4, 16, 64))
    retrieval = dict(
        kind="retrieval",
        task=FACTS | dict(haystack=HELD_OUT),
        lengths=lengths,
        facts=4 if arm == "recall" else 8,
        queries=128 if arm == "recall" else 512,
    )
    perplexity = dict(kind="perplexity", lengths=lengths, tokens=131_072)
    config.evals = (retrieval,) if arm == "recall" else (retrieval, perplexity)
    return config
