"""What does a long context cost by its length, iRoPE beside all-RoPE of the same size?

    irope sweep experiments/cost_by_length        # on an otherwise idle machine
    irope report experiments/cost_by_length

Reading time, the time of a token and memory, from 8k to 256k tokens, measured here with `configs/scaling.py`: nothing
is trained, as neither depends on what weights say. What published models need on real chips is planned in
`experiments/max_context`.
"""

from irope_jax.study.grid import Cell, Study


def get_study() -> Study:
    return Study(
        name="cost_by_length",
        question="What does a long context cost by its length, iRoPE beside all-RoPE of the same size?",
        prediction="Of eight layers of the all-RoPE model seven read in quadratic time (the last attends for the last "
        "token only), of those of the iRoPE model one. So from where attention is most of the time, at about 64k, "
        "reading takes all-RoPE seven times as long, and the ratio stays there; a token takes four times as long (two "
        "global layers against eight), and its cache is four times as large. (Counted by hand, but written after a "
        "first measurement on a busy machine.)",
        cells=(Cell(name="scaling", config="../../configs/scaling.py", verb="eval"),),
    )
