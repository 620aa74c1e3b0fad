"""Evaluations by likelihood: every target once, with the context that was promised; and a model that needs context."""

import json
import math

import jax
import numpy as np
import pytest

from irope_jax.core.config import ConfigError, from_dict
from irope_jax.data.documents import Document, tokenized
from irope_jax.data.packing import batch_of
from irope_jax.data.reading import SourceError
from irope_jax.data.sources import TextFile
from irope_jax.data.tokenizer import ByteTokenizer
from irope_jax.evals.cropped_perplexity import CroppedPerplexity
from irope_jax.evals.long_perplexity import KeysFrom, LongPerplexity, OwnKeys
from irope_jax.evals.multiple_choice import MultipleChoice, read_questions
from irope_jax.evals.registry import EvalSpec
from irope_jax.evals.sliding_perplexity import SlidingPerplexity, sliding_windows
from irope_jax.model.decoder import logits
from irope_jax.sharding.mesh import MeshConfig, make_mesh
from irope_jax.train.optimizer import make_optimizer
from irope_jax.train.state import init_state
from tests import tiny

TOKENIZER = ByteTokenizer(num_symbols=16)
MODEL = tiny.experiment().model


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Three documents of 90, 40 and 300 letters."""
    rng, folder = np.random.default_rng(0), tmp_path_factory.mktemp("text")
    for number, size in enumerate((90, 40, 300)):
        (folder / f"{number}.txt").write_bytes(rng.integers(112, 123, size).astype(np.uint8).tobytes())
    return TextFile(str(folder / "*.txt"))


class Losses:
    """Stands where the model is: the loss of a target by what is read before it, `loss(tokens read, target)`."""

    def __init__(self, loss):
        self.loss, self.shapes = loss, []

    def token_losses(self, params, batch):
        self.shapes.append(batch.tokens.shape)
        nll = np.full(batch.tokens.shape, np.nan)
        for b, t in np.argwhere(np.asarray(batch.info.segments) > 0):
            assert batch.info.positions[b, t] == t
            nll[b, t] = self.loss(batch.tokens[b, : t + 1].tolist(), int(batch.targets[b, t]))
        return nll, None


def run(spec, loss):
    evaluator = spec.build(MODEL, TOKENIZER)
    evaluator._scorer = Losses(loss)
    found = list(evaluator.run(None))
    return {(m.name, *m.where.values()): (m.value, m.count) for m in found}, evaluator._scorer.shapes


def test_windows_slide_as_drawn():
    # A row per window over tokens 0 to 8: "." is read, "X" is read and scored, the first token is never scored.
    picture = [
        ".XXXX....",
        "  ...XX..",
        "    ...XX",
    ]
    found = []
    for begin, first, end in sliding_windows(8, 4, 2):
        found.append(" " * begin + "." * (first - begin) + "X" * (end - first + 1) + "." * (8 - end))
    assert found == picture
    assert sliding_windows(8, 4, 2) == [(0, 1, 4), (2, 5, 6), (4, 7, 8)]
    assert sliding_windows(7, 4, 2)[-1] == (3, 7, 7) and sliding_windows(3, 4, 2) == [(0, 1, 3)]
    for targets, length, stride in [(100, 16, 5), (100, 16, 16), (33, 32, 1), (5, 32, 7)]:
        windows = sliding_windows(targets, length, stride)
        assert [t for _, first, end in windows for t in range(first, end + 1)] == list(range(1, targets + 1))
        assert all(end - begin <= length for begin, _, end in windows)
        assert all(first - begin > length - stride for begin, first, _ in windows[1:])


def test_sliding_perplexity_scores_every_target_once_with_nearly_full_context(source):
    spec = SlidingPerplexity(source=source, lengths=(16, 64), stride=4, tokens=400, batch_tokens=100)
    found, shapes = run(spec, lambda read, target: float(len(read)))
    # Documents have 91, 41 and 301 targets (eos is one); 400 takes 268 of the last.
    for length in (16, 64):
        wanted = []
        for targets in (91, 41, 268):
            for t in range(1, targets + 1):
                end = length if t <= length else length + 4 * math.ceil((t - length) / 4)
                end = min(end, targets)
                wanted.append(t - max(0, end - length))
        assert found["nll_sliding", length, 4] == (pytest.approx(np.mean(wanted)), 400)
    assert {shape[1] for shape in shapes} == {16, 64}
    # A target's own tokens are what is predicted.
    right = lambda read, target: float(target in (*range(97, 123), TOKENIZER.eos_id) and read[-1] != target)
    store = tokenized(source, TOKENIZER)
    text = [store[d] for d in range(3)]
    differ = np.concatenate([doc[1 : n + 1] != doc[:n] for doc, n in zip(text, (91, 41, 268))])
    assert run(spec, right)[0]["nll_sliding", 16, 4][0] == pytest.approx(differ.mean())


def test_a_stride_of_one_gives_each_token_the_whole_window(source):
    experiment = tiny.experiment(("model.init_std", "0.5"))
    optimizer = make_optimizer(experiment.train.optimizer, experiment.train.steps)
    model = experiment.model
    params = jax.device_get(init_state(model, optimizer, make_mesh(MeshConfig(), jax.devices()[:1]), 0).params)
    spec = SlidingPerplexity(source=source, lengths=(16,), stride=1, tokens=40, batch_tokens=640)
    (found,) = spec.build(model, TOKENIZER).run(params)
    tokens, nll = tokenized(source, TOKENIZER)[0], []
    rows = [tokens[max(0, t - 16) : t + 1] for t in range(1, 41)]
    batch = batch_of([Document(row, np.ones(len(row), np.float32)) for row in rows], 16, TOKENIZER.pad_id)
    log_p = np.asarray(jax.nn.log_softmax(logits(model, params, batch.tokens, batch.info)), np.float64)
    nll = [-log_p[i, len(row) - 2, row[-1]] for i, row in enumerate(rows)]
    assert found.value == pytest.approx(np.mean(nll), rel=1e-5) and found.count == 40


def test_cropping_changes_the_context_and_not_the_targets(source):
    seen = {}

    def loss(read, target):
        seen.setdefault(len(read), []).append(target)
        return 1.0 if len(read) > 40 else 3.0

    spec = CroppedPerplexity(source=source, lengths=(80,), crops=(32, 20, 90), scored=8, windows=4, batch_tokens=200)
    found, _ = run(spec, loss)
    assert found == {
        ("nll_full", 80): (1.0, 32),
        ("nll_cropped", 80, 32): (3.0, 32),
        ("context_gain", 80, 32): (2.0, 32),
        ("nll_cropped", 80, 20): (3.0, 32),
        ("context_gain", 80, 20): (2.0, 32),
    }
    # The last target of each window is the same, whatever is read before it.
    assert seen[80] == seen[32][-4:] == seen[20][-4:] and len(set(seen[80])) > 1


def test_long_perplexity_is_of_the_tokens_that_only_long_context_predicts(source, tmp_path):
    def loss(read, target):
        if target == ord("q"):
            return 0.5 if len(read) > 60 else 4.0  # needs long context: a key token
        if target == ord("x"):
            return 2.5 if len(read) > 60 else 9.0  # gains, and is still badly predicted
        return 1.0 if len(read) > 60 else 2.9  # gains less than 2

    keys = OwnKeys(short=32, stride=8, save=str(tmp_path / "keys.json"))
    spec = LongPerplexity(source=source, lengths=(90,), windows=4, keys=keys, batch_tokens=400)
    found, _ = run(spec, loss)
    store = tokenized(source, TOKENIZER)
    windows = [store[0][:91], *(store[2][90 * k :][:91] for k in range(3))]
    there = sum(int((window[61:] == ord("q")).sum()) for window in windows)
    assert found["long_nll", 90] == (0.5, there) and there > 3
    assert found["key_share", 90] == (pytest.approx(there / (4 * 58)), 4 * 58)
    # Another model is measured on the tokens that the first one chose.
    other = LongPerplexity(source=source, lengths=(90,), windows=4, keys=KeysFrom(str(tmp_path / "keys.json")))
    assert run(other, lambda read, target: 7.0 if target == ord("q") else 0.0)[0] == {
        ("long_nll", 90): (7.0, there),
        ("key_share", 90): (pytest.approx(there / (4 * 58)), 4 * 58),
    }
    with pytest.raises(ConfigError, match="too few windows"):
        LongPerplexity(source=source, lengths=(80,), windows=4, keys=other.keys).build(MODEL, TOKENIZER)
    with pytest.raises(ConfigError, match="another text or tokenizer"):
        LongPerplexity(lengths=(90,), windows=4, keys=other.keys).build(MODEL, TOKENIZER)


def test_without_key_tokens_only_the_share_is_measured(source):
    spec = LongPerplexity(source=source, lengths=(90,), windows=1, keys=OwnKeys(short=32, stride=8))
    assert run(spec, lambda read, target: 1.0)[0] == {("key_share", 90): (0.0, 58)}


QUESTIONS = (
    {"context": "The sky is", "choices": ["blue", "made of cheese and ham"], "answer": 0},
    {"question": "Two and two?", "choices": ["four", "fivefive", "six"], "answer": "fivefive"},
    {"context": "It ends with a space ", "choices": ["a", "b"], "answer": 1},
)


@pytest.fixture
def questions(tmp_path):
    path = tmp_path / "questions.jsonl"
    path.write_text("\n".join(map(json.dumps, QUESTIONS)) + "\n")
    return str(path)


def test_choices_are_judged_by_their_own_tokens_alone(questions):
    scored = {}

    def loss(read, target):
        text = TOKENIZER.decode([*read[1:], target])
        scored[text] = scored.get(text, 0) + 1
        return 1.0  # every byte costs the same: the shortest choice wins, per byte all are alike

    found, shapes = run(MultipleChoice(questions, lengths=(32, 64), batch_tokens=128), loss)
    # Shortest: right, wrong ("six" before "fivefive"), a tie that goes to the first, wrong.
    assert found["acc",] == (pytest.approx(1 / 3), 3)
    # Per byte, with the space before it: (n + 1) / n is least for the longest choice.
    assert found["acc_norm",] == (pytest.approx(1 / 3), 3)
    first, _ = run(MultipleChoice(questions, lengths=(64,), limit=1), lambda read, target: 1.0)
    assert (first["acc",][0], first["acc_norm",][0]) == (1.0, 0.0)
    assert found["chance",] == (pytest.approx((1 / 2 + 1 / 3 + 1 / 2) / 3), 3)
    assert {shape[1] for shape in shapes} == {32, 64}
    for text in ("The sky is blue", "Question: Two and two?\nAnswer: six", "It ends with a space b"):
        assert text in scored


def test_only_the_choice_counts_and_the_greatest_likelihood_wins(questions):
    wanted = [" blue", " fivefive", " b"]

    def loss(read, target):
        text = TOKENIZER.decode([*read[1:], target])
        begins = ("The sky is", "Question: Two and two?\nAnswer:", "It ends with a space")
        for begin, right in zip(begins, wanted):
            if text.startswith(begin) and len(text) > len(begin):
                return 0.1 if (begin + right).startswith(text) else 5.0
        return 1000.0 * len(text)  # of the context: must not count

    found, _ = run(MultipleChoice(questions, lengths=(64,)), loss)
    assert found["acc",][0] == found["acc_norm",][0] == 1.0
    assert run(MultipleChoice(questions, lengths=(64,), limit=1), loss)[0]["acc",] == (1.0, 1)


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("{", "not a question"),
        ('{"context": "a", "choices": ["b", "c"]}', "no 'answer'"),
        ('{"context": "a", "choices": ["b", "c"], "answer": 2}', "an index from 0"),
        ('{"context": "a", "choices": ["b", "c"], "answer": "d"}', "none of the choices"),
        ('{"context": "a", "choices": ["b"], "answer": 0}', "two texts or more"),
        ("", "holds no question"),
    ],
)
def test_damaged_questions_are_named(tmp_path, line, what):
    path = tmp_path / "bad.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(SourceError, match=what):
        read_questions(str(path))


def test_mistakes_are_said_before_a_run(source, questions):
    for wrong, field in [
        (lambda: SlidingPerplexity(stride=0), "stride"),
        (lambda: SlidingPerplexity(source=source, tokens=500).build(MODEL, TOKENIZER), "tokens"),
        (lambda: CroppedPerplexity(crops=(64,), scored=64), "crops"),
        (lambda: CroppedPerplexity(lengths=(512,), crops=(512,)), "lengths"),
        (
            lambda: CroppedPerplexity(source=source, lengths=(80,), crops=(40,), scored=4).build(MODEL, TOKENIZER),
            "windows",
        ),
        (lambda: LongPerplexity(lengths=(4096,)), "lengths"),
        (lambda: MultipleChoice(""), "path"),
        (lambda: MultipleChoice(questions, lengths=(16,)).build(MODEL, TOKENIZER), "lengths"),
    ]:
        with pytest.raises(ConfigError) as error:
            wrong()
        assert error.value.field.split(".")[-1] == field
    assert from_dict(EvalSpec, dict(kind="long_perplexity", keys=dict(kind="own", short=100))).keys.short == 100
