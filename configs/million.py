"""A model trained at 128 tokens, asked about texts of up to a million: facts in a haystack, by length and depth.

    bash scripts/quickstart.sh                             # first: the model
    for arm in log_n_1 log_n_8 log_n_64 none_1 none_8 none_64; do
        irope eval --config=configs/million.py:$arm
    done
    irope report runs/million/{log_n,none}_* --out=runs/million/report

Nothing is trained here: the weights are those of the quickstart's iRoPE model. `log_n` is the temperature it was made
with, which at 128 tokens and less is exactly 1, so `none` takes nothing away that was learned. The number is that of
facts in a text, all of them asked for at its end. Up to 8,192 times the training length are read in pieces of 16,384
tokens with a KV cache; the last layer, the only one that sees everything, attends only where an answer is due.
A run that is killed goes on after the texts it has finished.
"""

from ml_collections import ConfigDict
from quickstart import FACTS, HELD_OUT, LENGTH
from quickstart import get_config as quickstart

TIMES = (1, 8, 64, 512, 2048, 8192)
QUESTIONS = {1: 8, 8: 64, 64: 256}
"""Facts in a text: questions at each length."""

ARMS = tuple(f"{temperature}_{facts}" for temperature in ("log_n", "none") for facts in QUESTIONS)


def get_config(arm: str = "log_n_8") -> ConfigDict:
    if arm not in ARMS:
        raise ValueError(f"unknown arm {arm!r}; choose one of: {', '.join(ARMS)}")
    temperature, _, number = arm.rpartition("_")
    facts = int(number)
    config = quickstart("irope")
    config.name = f"million/{arm}"
    config.description = f"{facts} facts, " + ("log-n temperature" if temperature == "log_n" else "no temperature")
    if temperature == "none":
        *local, far = config.model.pattern
        config.model.pattern = (*local, {name: value for name, value in far.items() if name != "temperature"})
    config.train.init_from = "runs/quickstart/irope"
    lengths = [LENGTH * times for times in TIMES]
    config.evals = (
        dict(
            kind="retrieval",
            task=FACTS | dict(haystack=HELD_OUT),
            lengths=tuple(length for length in lengths if length >= 16 * facts),
            facts=facts,
            queries=QUESTIONS[facts],
        ),
    )
    return config
