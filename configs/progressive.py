"""Length by length: 256, 1,024, 4,096 tokens in one run, each stage over when it can.

    irope train --config=configs/progressive.py            # RoPE everywhere, its base growing with the length
    irope train --config=configs/progressive.py:irope      # chunk-local RoPE layers and a global one without positions
    irope report runs/progressive/rope

Under half an hour on two CPU cores. Text is Jane Austen's novels as bytes with facts let in, as in `quickstart.py`; a
first lesson of 32 tokens of bare pairs teaches looking up, which takes far longer among letters. A stage ends when the
loss at 256 tokens is within two percent of what it was before the stage and retrieval at the new length is right, or at
its last step. Every batch has 4,096 tokens, whatever the length.
"""

import math

from ml_collections import ConfigDict

LENGTHS = (256, 1024, 4096)
LESSON = 32
FACTS = dict(kind="needle", haystack=dict(kind="text", source=dict(kind="corpus", split="train")))
HELD_OUT = dict(kind="text", source=dict(kind="corpus", split="validation"))
ARMS = {
    "rope": "RoPE and a global mask in every layer; the base grows with the length",
    "irope": "three chunk-local RoPE layers and one global NoPE layer with log-n temperature; only the length grows",
}
THETAS = {256: 10_000.0, 1024: 80_000.0, 4096: 640_000.0}
"""Bases of the rotation: the slowest pair turns about as far over a row of each."""


def layers(arm: str, chunk: int) -> tuple:
    ffn = dict(kind="swiglu", hidden_dim=128)
    rope = dict(kind="rope", theta=THETAS[256])
    if arm == "rope":
        return (dict(position=rope, mask=dict(kind="global"), ffn=ffn),)
    local = dict(position=rope, mask=dict(kind="chunked", size=chunk), ffn=ffn)
    log_n = dict(kind="log_floor", floor_scale=LENGTHS[0], attn_scale=1 / math.log(LENGTHS[0]))
    far = dict(position=dict(kind="nope"), mask=dict(kind="global"), temperature=log_n, ffn=ffn)
    return (local, local, local, far)


def mixture() -> list:
    facts = FACTS | dict(num_facts=(1, 8), num_queries=(3, 16), answer_weight=2.5)
    return [dict(source=facts, weight=0.7), dict(source=dict(kind="corpus", split="train"), weight=0.3)]


def stage(arm: str, length: int, steps: int, rate: float) -> dict:
    """One length: its gate, and what changes with it."""
    change = {"data.mixture": mixture(), "train.optimizer.learning_rate": rate}
    conditions = [dict(evaluation="retrieval", measure="accuracy", where={"length": length}, at_least=0.95)]
    if arm == "rope":
        change["model.pattern.*.position.theta"] = THETAS[length]
    else:
        change["model.pattern.*.mask.size"] = 64
    if length > LENGTHS[0]:
        shorter = dict(evaluation="perplexity", measure="nll_by_length", where={"length": LENGTHS[0]}, within=0.02)
        conditions.append(shorter)
    gate = dict(conditions=conditions, every=100, least_steps=steps // 2)
    return dict(name=str(length), steps=steps, length=length, batch_tokens=4096, change=change, gate=gate)


def get_config(arm: str = "rope") -> ConfigDict:
    if arm not in ARMS:
        raise ValueError(f"unknown arm {arm!r}; choose one of: {', '.join(ARMS)}")
    config = ConfigDict()
    config.name = f"progressive/{arm}"
    config.description = ARMS[arm]
    config.model = dict(
        vocab_size=400,
        d_model=64,
        num_layers=4,
        num_heads=2,
        num_kv_heads=2,
        head_dim=32,
        pattern=layers(arm, LESSON // 2),
        output_head="untied",
        init_std=0.1,
        embedding_init_std=0.3,
        residual_init_std=0.0035,  # near zero: at first the layers between look-up and binding stand aside
    )
    config.data = dict(
        seq_len=LESSON,
        batch_size=4096 // LESSON,
        tokenizer=dict(kind="bytes", num_symbols=128),
        mixture=(dict(source=dict(kind="multi_query_recall", num_pairs=(2, 7))),),
        packing=dict(kind="one_per_row"),
    )
    config.train = dict(
        steps=500,  # stages say their own
        optimizer=dict(
            learning_rate=3e-3,
            schedule=dict(kind="cosine", warmup=50, final=0.3),
            algorithm=dict(kind="adamw", b2=0.98),
            weight_decay=0.05,
        ),
    )
    config.checkpoint = dict(every=200)
    config.evals = (
        dict(kind="retrieval", task=FACTS | dict(haystack=HELD_OUT), lengths=LENGTHS, facts=4, queries=64),
        dict(kind="perplexity", lengths=LENGTHS, tokens=32_768),
    )
    config.stages = (
        dict(name="lesson", steps=500),
        stage(arm, 256, 700, 2e-3),
        stage(arm, 1024, 400, 1e-3),
        stage(arm, 4096, 300, 6e-4),
    )
    return config
