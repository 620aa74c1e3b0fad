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
        verdict="Reading: yes, from 64k on all-RoPE takes 6.2 to 6.7 times as long (150 s against 1,009 s at 256k), "
        "3.6 to 4.1 times below. A token: no, 1.7 to 2.1 times up to 64k, where what does not depend on the "
        "length is most of it, and 2.8 to 3.8 times at 128k and 256k. The cache: 3.3 times as large at 8k, "
        "where chunks count, 3.8 times at 256k; one hears that chunked layers leave the cache as large as it "
        "was, and they do not. Most memory held: up to 64k the iRoPE model holds more (179 to 253 MB against "
        "89 to 164), from 128k on less (270 against 672 MB at 256k). One run, with short tests beside it now "
        "and then; a machine on which a token is bound by reading its cache would have to show four times at "
        "256k, or we are wrong about what bounds it here. Published models on real chips: "
        "experiments/max_context.",
        cells=(Cell(name="scaling", config="../../configs/scaling.py", overrides={"name": "scaling"}, verb="eval"),),
    )
