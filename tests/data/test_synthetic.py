"""Each task is judged by a solver that reads the tokens only and must find every answer where the sample says it is."""

import json
import time

import numpy as np
import pytest

from irope_jax.core.config import ConfigError, from_dict, to_dict
from irope_jax.data.haystacks import TextHaystack
from irope_jax.data.synthetic import Copy, MultiQueryRecall, Needle, TaskSpec, VariableTracking
from irope_jax.data.synthetic_lists import ManyValues, SameValue
from irope_jax.data.tokenizer import ByteTokenizer

TOKENIZER = ByteTokenizer(128)
SET, GET, LET, COPY = map(TOKENIZER.marker, ("set", "get", "let", "copy"))
FIRST = int(TOKENIZER.symbols(0, 1)[0])

TASKS = [
    Needle(),
    Needle(TextHaystack()),
    Needle(num_facts=(2, 6), num_queries=(1, 4), queries="end"),
    Needle(key_tokens=2, value_tokens=3, num_keys=10, num_values=10, num_facts=(1, 4), num_queries=(1, 3)),
    MultiQueryRecall(),
    Copy(),
    Copy(TextHaystack(), (3, 3), depth=0.5),
    VariableTracking(),
    ManyValues(),
    ManyValues(TextHaystack(), num_lists=(4, 4), values_each=(1, 3)),
    SameValue(),
]
IDS = [f"{task.kind}{i}" for i, task in enumerate(TASKS)]


def samples(task, count=20, lengths=(97, 128, 400), **overrides):
    for seed in range(count):
        length = lengths[seed % len(lengths)]
        yield task.sample(np.random.default_rng(seed), length, TOKENIZER, **overrides), length


def solve_needle(tokens, key, value):
    """{index of an answer token: token}, from a dictionary filled while reading."""
    facts, found = {}, {}
    for i, token in enumerate(tokens):
        name = tuple(tokens[i + 1 : i + 1 + key])
        if token == SET:
            assert name not in facts
            facts[name] = tokens[i + 1 + key : i + 1 + key + value]
        elif token == GET:
            found |= {i + 1 + key + j: facts[name][j] for j in range(value)}
    return found


def solve_recall(tokens):
    facts, found = {}, {}
    for i, token in enumerate(tokens[:-1]):
        if FIRST <= token < FIRST + 64:
            if token in facts:
                found[i + 1] = facts[token]
            facts.setdefault(token, tokens[i + 1])
    return found


def solve_copy(tokens):
    first, again = tokens.index(SET), tokens.index(COPY)
    return {i: tokens[first + i - again] for i in range(again + 1, len(tokens))}


def solve_tracking(tokens):
    value, found = {}, {}
    for i, token in enumerate(tokens):
        if token == SET:
            value[tokens[i + 1]] = tokens[i + 2]
        elif token == LET:
            value[tokens[i + 1]] = value[tokens[i + 2]]
        elif token == GET:
            found[i + 2] = value[tokens[i + 1]]
    return found


def solve_many_values(tokens):
    values, found = {}, {}
    for i, token in enumerate(tokens):
        if token == SET:
            values.setdefault(tokens[i + 1], []).append(tokens[i + 2])
        elif token == GET:
            found |= {i + 2 + j: value for j, value in enumerate(values[tokens[i + 1]])}
    return found


def solve_same_value(tokens):
    value, found = {}, {}
    for i, token in enumerate(tokens):
        if token == SET:
            value[tokens[i + 1]] = tokens[i + 2]
        elif token == LET:
            value[tokens[i + 1]] = value[tokens[i + 2]]
        elif token == GET:
            names = [name for name, own in value.items() if own == tokens[i + 1]]
            found |= {i + 2 + j: name for j, name in enumerate(names)}
    return found


def solve(task, tokens):
    if task.kind in ("many_values", "same_value"):
        return {"many_values": solve_many_values, "same_value": solve_same_value}[task.kind](tokens)
    if isinstance(task, Needle):
        return solve_needle(tokens, task.key_tokens, task.value_tokens)
    return {"multi_query_recall": solve_recall, "copy": solve_copy, "variable_tracking": solve_tracking}[task.kind](
        tokens
    )


@pytest.mark.parametrize("task", TASKS, ids=IDS)
def test_a_reader_finds_every_answer(task):
    for sample, length in samples(task):
        tokens = sample.tokens.tolist()
        assert len(tokens) == len(sample.weights) == len(sample.answers) == length and tokens[0] == TOKENIZER.bos_id
        assert sample.tokens.dtype == np.int32 and sample.weights.dtype == np.float32 and sample.answers.dtype == bool
        found = solve(task, tokens)
        assert sorted(found) == np.flatnonzero(sample.answers).tolist()
        assert all(tokens[i] == answer for i, answer in found.items())


@pytest.mark.parametrize("task", TASKS, ids=IDS)
def test_meta_points_at_questions_and_facts(task):
    for sample, _ in samples(task):
        meta, tokens = sample.meta, sample.tokens.tolist()
        spans = list(zip(meta["answer_start"], meta["answer_end"], meta["fact_start"], meta["fact_end"], meta["depth"]))
        assert len(spans) == meta["num_queries"]
        covered = sorted(i for a, b, *_ in spans for i in range(a, b + 1))
        assert covered == np.flatnonzero(sample.answers).tolist()
        for start, end, fact, fact_end, depth in spans:
            assert 0 < fact <= fact_end < start <= end and 0 <= depth <= 1
            width = end - start + 1
            if task.kind != "multi_query_recall":
                assert tokens[fact] == SET
            if task.kind == "variable_tracking":
                assert tokens[fact_end] == tokens[start]
            elif task.kind in (
                "many_values",
                "same_value",
            ):  # the first fact has the first answer and what is asked for
                assert {tokens[fact + 1], tokens[fact_end]} == {tokens[start], tokens[start - 1]}
                assert tokens[start - 2] == GET and fact_end == fact + 2
            elif task.kind != "copy":  # key and value of the fact are those of the question
                assert tokens[fact_end - width + 1 : fact_end + 1] == tokens[start : end + 1]
                key = 1 if task.kind == "multi_query_recall" else task.key_tokens
                assert tokens[fact_end - width + 1 - key : fact_end - width + 1] == tokens[start - key : start]


@pytest.mark.parametrize("task", TASKS, ids=IDS)
def test_weights_are_on_text_and_answers_only(task):
    heavy = {"answer_weight": 3.0} | ({} if task.kind == "multi_query_recall" else {"text_weight": 0.5})
    for sample, _ in samples(task, 6, **heavy):
        is_text = (sample.tokens < 256) & (task.kind != "multi_query_recall")
        expected = np.where(sample.answers, 3.0, np.where(is_text, 0.5, 0.0))
        np.testing.assert_array_equal(sample.weights, expected)


@pytest.mark.parametrize("task", TASKS, ids=IDS)
def test_same_rng_same_sample(task):
    a, b = (task.sample(np.random.default_rng(5), 200, TOKENIZER) for _ in range(2))
    c = task.sample(np.random.default_rng(6), 200, TOKENIZER)
    np.testing.assert_array_equal(a.tokens, b.tokens)
    assert (a.tokens != c.tokens).any()


def test_needle_mixed_asks_at_the_end_and_before_it():
    early = 0
    for sample, length in samples(Needle(num_queries=(4, 8)), 30, (128,)):
        assert sample.meta["answer_end"].max() == length - 1
        early += (sample.meta["answer_end"] < length - 60).sum()
    assert early > 20


def test_needle_end_stands_at_the_given_depths():
    task = Needle(num_facts=(5, 5), num_queries=(9, 9), queries="end", depths=(0.0, 0.5, 1.0))
    for sample, length in samples(task, 10, (128, 1000)):
        meta = sample.meta
        assert meta["num_queries"] == 3 and meta["num_facts"] == 5
        assert (sample.tokens == SET).sum() == 5 and (sample.tokens[-9::3] == GET).all()
        order = np.argsort(meta["depth"])
        np.testing.assert_allclose(meta["depth"][order], [0, 0.5, 1], atol=1.5 / (length - 25))
        text = np.cumsum(sample.tokens < 256)
        np.testing.assert_allclose(text[meta["fact_start"]] / text[-1], meta["depth"], atol=1e-9)


def test_needle_end_asks_each_fact_at_most_once():
    for sample, _ in samples(Needle(num_facts=(1, 4), num_queries=(8, 8), queries="end")):
        assert len(set(sample.meta["fact_start"].tolist())) == sample.meta["num_queries"] == sample.meta["num_facts"]


def test_facts_stand_everywhere():
    task = Needle(num_facts=(4, 4), queries="end", num_queries=(4, 4))
    depth = np.concatenate([s.meta["depth"] for s, _ in samples(task, 200, (200,))])
    assert np.histogram(depth, 4, (0, 1))[0].min() > 150  # 800 facts, 200 expected in each quarter


def test_recall_gaps_follow_a_power_law():
    task = MultiQueryRecall(num_pairs=(4, 4))
    slots = [(s.meta["answer_start"] - 1 - 9) // 2 for s, _ in samples(task, 300, (128,))]
    slots = np.concatenate(slots)
    law = np.arange(1, 60) ** -0.99
    law /= law.sum()
    assert (slots < 8).mean() > 2 * 8 / 59 and slots.min() >= 0 and slots.max() <= 58
    # without replacement the law is flattened, but order remains: early slots are taken most
    assert (slots == 0).sum() > (slots == 4).sum() > (slots == 40).sum()


def test_tracking_links_stand_in_order():
    for sample, _ in samples(VariableTracking(num_chains=(3, 3), hops=(3, 3))):
        links = sample.meta["link_starts"]
        assert links.shape == (3, 4) and (np.diff(links, axis=1) > 0).all()
        assert (sample.tokens[links[:, 0]] == SET).all() and (sample.tokens[links[:, 1:]] == LET).all()


@pytest.mark.parametrize("task", TASKS, ids=IDS)
def test_the_shortest_length_fits_and_one_less_is_an_error(task):
    for seed in range(30):
        task.sample(np.random.default_rng(seed), task.shortest, TOKENIZER)
    with pytest.raises(ConfigError, match=f"length={task.shortest - 1}: .*at least {task.shortest}"):
        task.sample(np.random.default_rng(0), task.shortest - 1, TOKENIZER)


def test_mistakes_name_the_field():
    with pytest.raises(ConfigError, match=r"tokenizer\.num_symbols=12: .*needs 128"):
        Needle().sample(np.random.default_rng(0), 128, ByteTokenizer(12))
    for field, bad in {
        "num_facts": lambda: Needle(num_facts=(3, 2)),
        "num_queries": lambda: Needle(num_queries=(0, 2)),
        "depths": lambda: Needle(num_facts=(1, 3), depths=(0.1, 0.2)),
        "queries": lambda: Needle(queries="ends"),
        "num_keys": lambda: Needle(num_keys=0),
        "answer_weight": lambda: Copy(answer_weight=-1.0),
        "depth": lambda: Copy(depth=2.0),
        "num_pairs": lambda: MultiQueryRecall(num_pairs=(1, 65)),
        "power": lambda: MultiQueryRecall(power=0.0),
        "num_chains": lambda: VariableTracking(num_chains=(1, 13)),
        "num_lists": lambda: ManyValues(num_lists=(1, 65)),
        "values_each": lambda: ManyValues(values_each=(2, 65)),
        "hops": lambda: SameValue(hops=(0, 1)),
    }.items():
        with pytest.raises(ConfigError) as error:
            bad()
        assert error.value.field == field
    with pytest.raises(ConfigError, match="depths lie between"):
        Needle(depths=(1.5,))
    with pytest.raises(ConfigError, match="keys are unique"):
        Needle(num_facts=(1, 65))


def test_tasks_round_trip_as_config():
    for task in TASKS:
        assert from_dict(TaskSpec, json.loads(json.dumps(to_dict(task)))) == task


@pytest.mark.parametrize("task", TASKS, ids=IDS)
def test_generation_is_fast(task):
    rng = np.random.default_rng(0)
    task.sample(rng, 200, TOKENIZER)
    start = time.process_time()
    for _ in range(10):
        task.sample(rng, 8192, TOKENIZER)
    middle = time.process_time()
    task.sample(rng, 1_000_000, TOKENIZER)
    assert (middle - start) / 10 < 0.01 and time.process_time() - middle < 1
