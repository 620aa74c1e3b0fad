"""A LongRoPE search: how it is bred and what candidates are scored on.

    irope search-rope --checkpoint=RUN --config=configs/search_rope.py                # the paper's numbers, 8k to 128k
    irope search-rope --checkpoint=runs/extend_tiny --config=configs/search_rope.py:tiny
    irope search-rope --checkpoint=assets/smollm2-135m --config=configs/search_rope.py:smollm2

`tiny` stretches `configs/extend_tiny.py` from 256 to 2,048 tokens, 292 candidates in some ten minutes on two CPU cores.
`smollm2` stretches SmolLM2-135M from 8k to 16k; five candidates, since each takes two minutes there.
"""

from ml_collections import ConfigDict


def get_config(which: str = "paper") -> ConfigDict:
    config = ConfigDict()
    if which == "paper":
        config.original_length, config.length = 8192, 131_072
        config.objective = dict(kind="text", source=dict(kind="corpus", split="validation"), documents=1)
    elif which == "tiny":
        config.original_length, config.length = 256, 2048
        config.objective = dict(kind="text", source=dict(kind="corpus", split="validation"), documents=4)
        config.batch_tokens = 8192
        config.method = dict(
            kind="evolution",
            population=52,
            parents=16,
            mutations=16,
            crossovers=8,
            iterations=10,
            first_tokens=(0, 4, 16),
        )
    elif which == "smollm2":
        config.original_length, config.length = 8192, 16_384
        config.objective = dict(kind="text", source=dict(kind="corpus", split="validation"), documents=1)
        config.method = dict(
            kind="evolution", population=3, parents=2, mutations=1, crossovers=1, iterations=1, first_tokens=(0,)
        )
        config.at_once = 1
    else:
        raise ValueError(f"unknown search {which!r}; choose one of: paper, tiny, smollm2")
    return config
