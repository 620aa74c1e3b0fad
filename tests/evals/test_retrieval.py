"""Retrieval with scorers whose answers are known, and with cells counted again from the tokens."""

from collections import Counter

import jax
import numpy as np
import pytest

from irope_jax.core.config import ConfigError
from irope_jax.data.synthetic import Copy, MultiQueryRecall, Needle, VariableTracking
from irope_jax.data.synthetic_lists import ManyValues, SameValue
from irope_jax.data.tokenizer import ByteTokenizer
from irope_jax.evals.retrieval import Retrieval
from irope_jax.model.decoder import logits
from irope_jax.sharding.mesh import MeshConfig, make_mesh
from irope_jax.train.optimizer import make_optimizer
from irope_jax.train.state import init_state
from tests import tiny

TOKENIZER = ByteTokenizer(num_symbols=16)
SET, GET, COPY = map(TOKENIZER.marker, ("set", "get", "copy"))
CHUNK = 8  # of the tiny model
KEY_TOKENS, VALUE_TOKENS = 2, 2
WIDTH = 1 + KEY_TOKENS + VALUE_TOKENS
TASK = Needle(num_keys=8, num_values=8, key_tokens=KEY_TOKENS, value_tokens=VALUE_TOKENS)


def spec(**changes):
    plain = dict(task=TASK, lengths=(48, 96), queries=70, facts=4, depth_bins=4, batch_tokens=480)
    return Retrieval(**(plain | changes))


class Stub:
    """Stands where the forward pass is; remembers every row and answers by `answer(tokens up to the place, wanted)`."""

    def __init__(self, answer):
        self.answer, self.seen = answer, []

    def predictions(self, params, batch, places_BQ, wanted_BQ):
        tokens_BT = np.asarray(batch.tokens)
        asks = lambda row: ((row == GET) | (row == COPY)).any()
        self.seen += [(row[row != TOKENIZER.pad_id], batch.tokens.shape[1]) for row in tokens_BT if asks(row)]
        best, nll = np.full(places_BQ.shape, -1), np.zeros(places_BQ.shape)
        for (b, q), place in np.ndenumerate(places_BQ):
            if place and asks(tokens_BT[b]):  # place 0 fills up rows of fewer answers
                best[b, q], nll[b, q] = self.answer(tokens_BT[b, : place + 1], wanted_BQ[b, q])
        return best, nll


def look_up(tokens, wanted):
    """Finds the fact, reading only what stands up to the place asked; the loss is the place in the value."""
    get = np.flatnonzero(tokens == GET)[-1]
    key, said = tokens[get + 1 : get + 1 + KEY_TOKENS], len(tokens) - (get + 1 + KEY_TOKENS)
    facts = [s for s in np.flatnonzero(tokens == SET) if (tokens[s + 1 : s + 1 + KEY_TOKENS] == key).all()]
    assert len(facts) == 1 and 0 <= said < VALUE_TOKENS
    return tokens[facts[0] + 1 + KEY_TOKENS + said], float(said)


def run(evaluator_spec, answer):
    evaluator = evaluator_spec.build(tiny.experiment().model, TOKENIZER)
    evaluator._scorer = Stub(answer)
    return list(evaluator.run(None)), evaluator._scorer.seen


def accuracy(measurements, **where):
    chosen = [m for m in measurements if m.name == "accuracy" and where.items() <= m.where.items()]
    return sum(m.value * m.count for m in chosen) / sum(m.count for m in chosen)


@pytest.fixture(scope="module")
def oracle():
    return run(spec(), look_up)


def test_one_who_knows_where_to_look_is_always_right(oracle):
    measurements, _ = oracle
    assert {m.value for m in measurements if m.name == "accuracy"} == {1.0}
    assert {m.value for m in measurements if m.name == "answer_nll"} == {0.5}  # mean of the losses 0 and 1


def test_one_who_guesses_is_right_by_chance():
    rng = np.random.default_rng(0)
    values = TOKENIZER.symbols(8, 8)
    one = Needle(num_keys=8, num_values=8)
    found, _ = run(spec(task=one, lengths=(48,), queries=800), lambda tokens, wanted: (rng.choice(values), 0.0))
    chance, deviation = 1 / 8, (1 / 8 * 7 / 8 / 800) ** 0.5
    assert abs(accuracy(found) - chance) < 4 * deviation


def test_a_value_counts_only_if_every_token_of_it_is_right():
    half_right = lambda tokens, wanted: (wanted if tokens[-1 - KEY_TOKENS] == GET else -1, 0.0)
    found, _ = run(spec(), half_right)
    assert accuracy(found) == 0.0


def count_again(seen):
    """How many questions fall into each (length, depth, straddle), from the tokens alone."""
    cells = Counter()
    for tokens, length in seen:
        facts = np.flatnonzero(tokens == SET)
        questions = np.flatnonzero(tokens == GET)
        room = length + 1 - 1 - WIDTH * (len(facts) + len(questions))
        for question in questions:
            key = tokens[question + 1 : question + 1 + KEY_TOKENS]
            (number,) = [n for n, s in enumerate(facts) if (tokens[s + 1 : s + 1 + KEY_TOKENS] == key).all()]
            start = facts[number]
            filler_before = start - 1 - WIDTH * number
            depth = (min(int(4 * filler_before / room), 3) + 0.5) / 4
            straddle = len({place // CHUNK for place in range(start, start + WIDTH)}) > 1
            cells[length, depth, straddle] += 1
    return cells


def test_every_question_is_in_the_cell_of_its_fact(oracle):
    measurements, seen = oracle
    cells = count_again(seen)
    for name in ("accuracy", "answer_nll"):
        assert {tuple(m.where.values()): m.count for m in measurements if m.name == name} == dict(cells)
    assert {straddle for *_, straddle in cells} == {True, False}


def test_as_many_questions_as_asked_for_evenly_over_the_depths(oracle):
    cells = count_again(oracle[1])
    by_length, by_depth = Counter(), Counter()
    for (length, depth, _), n in cells.items():
        by_length[length] += n
        by_depth[depth] += n if length == 96 else 0
    assert by_length == {48: 72, 96: 72}  # 70 in whole samples of 4
    # One fact in each quarter of each sample; filler is whole tokens, so one at the end of its quarter may round up.
    assert all(abs(n - 18) <= 3 for n in by_depth.values()) and len(by_depth) == 4


def test_contexts_are_as_long_as_said_and_facts_straddle_no_border_of_a_model_without_chunks(oracle):
    assert {(len(tokens), length) for tokens, length in oracle[1]} == {(48, 48), (96, 96)}
    whole = tiny.experiment(("model.pattern.0.mask.kind", "global")).model
    evaluator = spec(lengths=(48,)).build(whole, TOKENIZER)
    evaluator._scorer = Stub(look_up)
    assert {m.where["straddle"] for m in evaluator.run(None)} == {False}


def read_lists(tokens, wanted):
    """Of `GET key …` says the next value of the key, of `COPY …` the next token of the string."""
    ask = np.flatnonzero((tokens == GET) | (tokens == COPY))[-1]
    facts = np.flatnonzero(tokens == SET)
    if tokens[ask] != GET:
        return tokens[facts[0] + len(tokens) - ask], 0.0
    values = [tokens[s + 2] for s in facts if tokens[s + 1] == tokens[ask + 1]]
    return values[len(tokens) - ask - 2], 0.0


@pytest.mark.parametrize(
    ("task", "facts"),
    [
        (ManyValues(num_keys=8, num_values=8, values_each=(2, 3)), 2),
        (Copy(string_tokens=(3, 6), num_values=16), 1),
        (VariableTracking(num_keys=8, num_values=8, hops=(1, 1)), 2),
        (SameValue(num_keys=8, num_values=8, hops=(1, 1)), 2),
    ],
)
def test_other_tasks_are_asked_in_the_same_way(task, facts):
    one = spec(task=task, facts=facts, queries=24, lengths=(48,))
    found, _ = run(one, lambda tokens, wanted: (wanted, 0.0))
    assert accuracy(found) == 1.0 and sum(m.count for m in found if m.name == "accuracy") == 24
    assert accuracy(run(one, lambda tokens, wanted: (-1, 0.0))[0]) == 0.0
    if task.kind in ("many_values", "copy"):
        assert accuracy(run(one, read_lists)[0]) == 1.0
    if task.kind == "copy":
        assert [m.where["depth"] for m in found if m.name == "accuracy"] == sorted([0.125, 0.375, 0.625, 0.875] * 2)


def test_a_list_is_right_only_as_a_whole():
    task = ManyValues(num_keys=8, num_values=8, values_each=(2, 2), num_lists=(1, 1))
    first_right = lambda tokens, wanted: (wanted if tokens[-2] == GET else -1, 0.0)
    found, _ = run(spec(task=task, facts=2, queries=8, lengths=(48,)), first_right)
    assert accuracy(found) == 0.0


def test_the_same_samples_at_every_run_and_others_with_another_seed(oracle):
    tokens = lambda seen: np.concatenate([row for row, _ in seen])
    again, elsewhere = run(spec(), look_up)[1], run(spec(seed=2), look_up)[1]
    np.testing.assert_array_equal(tokens(again), tokens(oracle[1]))
    assert (tokens(elsewhere) != tokens(oracle[1])).mean() > 0.2
    # The samples of a length do not depend on the other lengths.
    np.testing.assert_array_equal(tokens(run(spec(lengths=(96,)), look_up)[1]), tokens(oracle[1][18:]))


def test_a_run_that_was_cut_short_goes_on_after_the_samples_it_finished(tmp_path):
    class Cut(Stub):
        def predictions(self, *args):
            if len(self.seen) >= 12:
                raise KeyboardInterrupt
            return super().predictions(*args)

    def build(scorer):
        evaluator = spec().build(tiny.experiment().model, TOKENIZER, tmp_path)
        evaluator._scorer = scorer
        return evaluator

    params, cut, rest = {"w": np.ones(3)}, Cut(look_up), Stub(look_up)
    with pytest.raises(KeyboardInterrupt):
        list(build(cut).run(params))
    found = list(build(rest).run(params))
    whole, seen = run(spec(), look_up)
    assert [(m.name, m.value, m.count, m.where) for m in found] == [(m.name, m.value, m.count, m.where) for m in whole]
    rows = lambda own: {(tuple(tokens), length) for tokens, length in own}
    assert len(rest.seen) == len(seen) - len(cut.seen) and not rows(rest.seen) & rows(cut.seen)
    again = Stub(look_up)
    list(build(again).run({"w": np.zeros(3)}))  # other weights
    assert len(again.seen) == len(seen)


def test_the_forward_pass_scores_the_tokens_asked_for_on_one_device_and_on_eight():
    experiment = tiny.experiment(("model.init_std", "0.5"))
    optimizer = make_optimizer(experiment.train.optimizer, experiment.train.steps)
    model = experiment.model
    params = jax.device_get(init_state(model, optimizer, make_mesh(MeshConfig(), jax.devices()[:1]), 0).params)
    small = spec(task=Needle(num_keys=8, num_values=8), lengths=(48,), queries=16, facts=2, batch_tokens=384)
    evaluator = small.build(model, TOKENIZER)
    scorer, checked = evaluator._scorer, []

    class Checked:
        def predictions(self, params, batch, places, wanted):
            best, nll = scorer.predictions(params, batch, places, wanted)
            full = np.asarray(jax.jit(lambda b: logits(model, params, b.tokens, b.info))(batch), np.float64)
            rows = np.arange(len(places))[:, None]
            log_p = full - np.log(np.exp(full).sum(-1, keepdims=True))
            np.testing.assert_allclose(nll, -log_p[rows, places, wanted], rtol=1e-5)
            np.testing.assert_array_equal(best, full[rows, places].argmax(-1))
            np.testing.assert_array_equal(wanted, np.asarray(batch.targets)[rows, places])
            checked.append(len(places))
            return best, nll

    evaluator._scorer = Checked()
    one = list(evaluator.run(params))
    assert checked == [8]
    with jax.set_mesh(make_mesh(MeshConfig(data=8))):
        eight = list(small.build(model, TOKENIZER).run(params))
    assert [(m.name, m.count, m.where) for m in one] == [(m.name, m.count, m.where) for m in eight]
    np.testing.assert_allclose([m.value for m in one], [m.value for m in eight], rtol=1e-5)


def test_mistakes_are_found_before_anything_runs():
    for field, wrong in [
        ("facts", spec(task=Needle(num_keys=2, num_values=8, num_facts=(1, 2)))),
        ("facts", spec(task=Copy(num_values=8), facts=2)),
        ("facts", spec(task=MultiQueryRecall(num_keys=8, num_values=8, num_pairs=(1, 4)))),
        ("lengths", spec(lengths=(96, 20))),
        ("tokenizer.num_symbols", spec(task=Needle(num_keys=16, num_values=8))),
    ]:
        with pytest.raises(ConfigError) as error:
            wrong.check(TOKENIZER)
        assert error.value.field == field
    for wrong in (dict(queries=0), dict(facts=0), dict(depth_bins=0), dict(lengths=(1,))):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            spec(**wrong)
