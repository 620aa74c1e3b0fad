"""How far does an all-RoPE model go by changing its rotations, without and with a little training at the new length?

    irope sweep experiments/what_irope_buys --only=all_RoPE    # first, if it is not there: three trained models
    irope sweep experiments/extension_methods --jobs=2
    irope report experiments/extension_methods --only=as_they_are
    irope report experiments/extension_methods --only=trained --out=experiments/extension_methods/trained

The models are the all-RoPE arms of `what_irope_buys`, trained at 128 tokens. Methods are asked at 1 to 16 times that,
as they are with factors of 4 and 16, and after 150 steps at 512 tokens with a factor of 4. Two of the trained arms give
RoPE up: DroPE takes it out of every layer (arXiv 2512.12167, which trains on at the old length), SWAN out of every
fourth, with windows in the others (arXiv 2504.08719); both with the temperature of `what_irope_buys`. A method is one
line of METHODS. LongRoPE's factors were searched on the first of the three models (longrope_x4.json):

    irope search-rope --checkpoint=runs/what_irope_buys/all_RoPE/seed=0 --config=configs/search_rope.py:tiny \\
        --config.original_length=128 --config.length=512 --config.objective.documents=16 --out=runs/longrope_x4
"""

import json
import sys
from pathlib import Path

from irope_jax.study.grid import Cell, Study, plain_name, product, seeds

sys.path.insert(0, str(Path(__file__).parents[2]))
from experiments.what_irope_buys import grid as parts

LENGTH, QUICKSTART = parts.LENGTH, parts.QUICKSTART
TIMES = (1, 2, 4, 8, 16)
EVALS = (
    parts.retrieval("retrieval", 8, 256, TIMES),
    dict(kind="perplexity", lengths=tuple(LENGTH * n for n in TIMES), tokens=65_536),
)
METHODS = {
    "PI": lambda factor: dict(kind="linear", factor=factor),
    "NTK": lambda factor: dict(kind="ntk", factor=factor),
    "YaRN": lambda factor: dict(kind="yarn", factor=factor, original_length=LENGTH),
    "Llama 3": lambda factor: dict(kind="llama3", factor=factor, original_length=LENGTH),
}
LONGROPE = json.loads((Path(__file__).parent / "longrope_x4.json").read_text())
ADAPTING = dict(kind="dynamic_ntk", factor=1.0, original_length=LENGTH)
"""Takes its factor from the length of the text."""


def all_rope(scaling: dict | None = None) -> tuple:
    return (parts.layer(dict(parts.ROPE, scaling=scaling) if scaling else parts.ROPE),)


AS_THEY_ARE = {"no change": all_rope(), "dynamic NTK": all_rope(ADAPTING)} | {
    f"{name}, {factor} times": all_rope(method(float(factor))) for factor in (4, 16) for name, method in METHODS.items()
}
AS_THEY_ARE["LongRoPE, 4 times"] = all_rope(LONGROPE)
TRAINED = {
    "trained, no change": all_rope(),
    **{f"trained, {name}": all_rope(method(4.0)) for name, method in METHODS.items()},
    "trained, LongRoPE": all_rope(LONGROPE),
    "trained, DroPE": (parts.LAST,),
    "trained, SWAN": (parts.WINDOW, parts.WINDOW, parts.WINDOW, parts.LAST),
}
LONGER = {
    "data.mixture": parts.TRAINED_ON,
    "data.seq_len": 4 * LENGTH,
    "data.batch_size": 8,  # 4,096 tokens a step, as before
    "train.steps": 150,
}


def cell(name: str, pattern: tuple, **more) -> Cell:
    overrides = {"model.pattern": pattern, "evals": EVALS, "description": name} | more.pop("overrides", {})
    return Cell(name=plain_name(name), label=name, config=f"{QUICKSTART}:rope", overrides=overrides, **more)


VERDICT = (
    "Without training, three seeds, 8 facts, all of them. Unchanged, more is left than was predicted at 2 and 4 "
    "times, then nothing: RoPE does not extrapolate by itself, as is sometimes claimed."
)


def get_study() -> Study:
    asked = [cell(name, pattern, verb="eval", tags=("as_they_are",)) for name, pattern in AS_THEY_ARE.items()]
    trained = [cell(name, pattern, overrides=LONGER, tags=("trained",)) for name, pattern in TRAINED.items()]
    return Study(
        name="extension_methods",
        question="How far does an all-RoPE model go by changing its rotations, without and with a little training?",
        prediction="Without training: no change keeps nothing beyond twice its length; dynamic NTK and YaRN keep "
        "most to 4 times, Llama 3's rule near them; PI loses already at its own length, as it must be trained to; "
        "with a factor of 16 all lose some of the own length and none reaches 0.9 at 16 times. After 150 steps at "
        "512 tokens every method is right at 4 times, and PI has caught up; at 16 times only SWAN and DroPE, which "
        "have nothing that could be out of range, are above 0.9. Added before its arms were run: LongRoPE, searched "
        "for text loss at 512 tokens, is within 0.03 of YaRN at 4 times, untrained and trained.",
        verdict=VERDICT,
        cells=product([*asked, *trained], seeds(3, init_from="runs/what_irope_buys/all_RoPE")),
    )
