"""Passkeys: where the number stands, what is scored, and what a model that always knows it gets."""

import numpy as np
import pytest

from irope_jax.core.config import ConfigError
from irope_jax.data.haystacks import TextHaystack
from irope_jax.data.sources import Corpus
from irope_jax.data.text_needle import text_needle
from irope_jax.data.tokenizer import ByteTokenizer
from irope_jax.evals.passkey import Passkey
from tests import tiny

BYTES = ByteTokenizer()


def document(depth, length=400):
    haystack = TextHaystack(Corpus("validation")).fill(np.random.default_rng(0), length, BYTES)
    return text_needle(np.random.default_rng(1), haystack, length, BYTES, depth)


@pytest.mark.parametrize(("depth", "share"), [(0.0, 0.0), (0.5, 0.5), (1.0, 1.0)])
def test_the_fact_stands_at_its_depth_and_only_the_answer_counts(depth, share):
    made = document(depth)
    text = BYTES.decode(made.tokens)
    assert len(made.tokens) == 400 and text.startswith("<bos>")
    answer = BYTES.decode(made.tokens[made.weights > 0])
    assert len(answer) == 8 and text.endswith(f" is{answer}") and text.count(answer.strip()) == 3
    before, after = text.index("The secret number of the"), text.rindex("What is the secret")
    fact_end = text.index("Remember it") + len("Remember it: 1234567.\n")
    filler = before - len("<bos>") + after - 1 - fact_end
    assert abs((before - len("<bos>")) / filler - share) < 0.01


class Oracle:
    """Knows every answer, but those of texts of which `wrong` says otherwise."""

    def __init__(self, wrong):
        self.wrong, self.seen = wrong, 0

    def predictions(self, params, batch, places, wanted):
        best = np.array(wanted)
        for row in range(len(best)):
            answer, text = BYTES.decode(wanted[row]), BYTES.decode(batch.tokens[row])
            assert len(answer) == 8 and text.count(answer.strip()) == 2 and text.endswith(answer[:-1])
            if self.wrong(self.seen + row):
                best[row, -1] += 1
        self.seen += len(best)
        return best, np.full(wanted.shape, 0.5)


def test_accuracy_by_length_and_depth():
    spec = Passkey(lengths=(256, 320), samples=8, depth_bins=2, batch_tokens=2 * 320)
    evaluator = spec.build(tiny.experiment().model, BYTES)
    evaluator._scorer = Oracle(lambda number: number % 8 == 0)  # the shallowest of each length
    found = [(m.name, m.where["length"], m.where["depth"], m.value, m.count) for m in evaluator.run(None)]
    assert [cell[1:] for cell in found if cell[0] == "accuracy"] == [
        (256, 0.25, 0.75, 4),
        (256, 0.75, 1.0, 4),
        (320, 0.25, 0.75, 4),
        (320, 0.75, 1.0, 4),
    ]
    assert [cell[3] for cell in found if cell[0] == "answer_nll"] == [0.5] * 4


def test_too_short_a_length_is_said_before_a_run():
    with pytest.raises(ConfigError, match="fact and question alone take"):
        Passkey(lengths=(64,)).build(tiny.experiment().model, BYTES)
