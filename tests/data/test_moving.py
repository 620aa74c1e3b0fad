"""A run that stops and goes on with other hosts and another batch size: each document exactly once per epoch."""

import dataclasses
import json
from collections import Counter

import numpy as np
import pytest

from irope_jax.core.config import ConfigError
from irope_jax.data.config import DataConfig, Ingredient, LengthBuckets, MixtureStep
from irope_jax.data.packing import BestFit, OnePerRow
from irope_jax.data.pipeline import make_iterator
from irope_jax.data.sources import Jsonl
from irope_jax.data.synthetic import Copy
from irope_jax.data.tokenizer import ByteTokenizer

DOCUMENTS = 157  # no multiple of any batch: epochs end inside of batches
BOS = ByteTokenizer.bos_id


@pytest.fixture
def config(tmp_path):
    rng = np.random.default_rng(0)
    lines = [json.dumps({"text": f"{i:04d}" + "x" * int(rng.integers(1, 26))}) for i in range(DOCUMENTS)]
    (tmp_path / "d.jsonl").write_text("\n".join(lines))
    return DataConfig(seq_len=32, batch_size=8, mixture=(Ingredient(Jsonl(f"{tmp_path}/d.jsonl")),), seed=3)


def documents_of(batch):
    """Number of each document, in the order of rows and places."""
    found = []
    for tokens in batch.tokens:
        found += [int(bytes(tokens[t + 1 : t + 5].tolist())) for t in np.flatnonzero(tokens == BOS)]
    return found


def run(config, hosts, state, batches):
    """What all hosts together see in some batches, and the state that each of them has in the end."""
    iterators = [make_iterator(config, process_index=i, process_count=hosts) for i in range(hosts)]
    try:
        for iterator in iterators if state is not None else ():
            iterator.set_state(state)
        seen = []
        for _ in range(batches):
            for iterator in iterators:
                seen += documents_of(next(iterator))
        states = {json.dumps(iterator.get_state()) for iterator in iterators}
        assert len(states) == 1
        return seen, json.loads(states.pop())
    finally:
        for iterator in iterators:
            iterator.close()


MOVES = ((2, 8, 7), (4, 12, 5), (1, 6, 6), (4, 4, 30), (2, 16, 60))
"""(hosts, batch size, batches) of each part of the run."""


@pytest.mark.parametrize("prefetch", [0, 3])
@pytest.mark.parametrize(
    "packing", [OnePerRow(), BestFit(open_rows=7), BestFit(5, 8)], ids=["alone", "packed", "aligned"]
)
def test_each_document_comes_once_per_epoch_through_all_moves(config, packing, prefetch):
    config, seen, state, rows = dataclasses.replace(config, packing=packing, prefetch=prefetch), [], None, 0
    for hosts, batch_size, batches in MOVES:
        part, state = run(dataclasses.replace(config, batch_size=batch_size), hosts, state, batches)
        seen, rows = seen + part, rows + batches * batch_size
        waiting = [ref[2] for row in state["place"]["open"] for ref, _ in row]
        assert bool(waiting) == (packing.kind == "best_fit")
        epoch, drawn = state["place"]["drawn"][0]
        counts = Counter(seen) + Counter(waiting)  # whole documents: the index of a piece is that of its document
        assert sum(counts.values()) == epoch * DOCUMENTS + drawn
        assert sorted(Counter(counts[i] - epoch for i in range(DOCUMENTS)).items()) == [
            (often, count) for often, count in ((0, DOCUMENTS - drawn), (1, drawn)) if count
        ]
    assert epoch >= 5
    undisturbed, _ = run(dataclasses.replace(config, batch_size=2), 1, None, rows // 2)
    assert seen == undisturbed


def test_what_was_prefetched_is_not_lost(config):
    """The state is that of the batch handed out, though the thread is ahead of it."""
    config = dataclasses.replace(config, packing=BestFit(), prefetch=4)
    iterator = make_iterator(config)
    for _ in range(5):
        seen = documents_of(next(iterator))
    state = iterator.get_state()
    following = documents_of(next(iterator))
    iterator.close()
    again, _ = run(dataclasses.replace(config, batch_size=4), 2, state, 2)
    assert again == following and not set(again) & set(seen)


def test_skipping_is_taking_without_loading(config):
    config = dataclasses.replace(config, packing=BestFit())
    _, state = run(config, 1, None, 9)
    iterator = make_iterator(config)
    next(iterator)
    iterator.skip(8)
    assert iterator.get_state() == state
    following = documents_of(next(iterator))
    iterator.close()
    assert following == run(config, 1, state, 1)[0]


def test_mixture_weights_by_batch_hold_exactly_and_survive_a_stop(config, tmp_path):
    mixture = [*config.mixture]
    for name, weight in ("y", 3.0), ("z", 1.0):
        lines = [json.dumps({"text": f"{i:04d}{name * (i % 9 + 1)}"}) for i in range(50)]
        (tmp_path / name).write_text("\n".join(lines))
        mixture.append(Ingredient(Jsonl(f"{tmp_path}/{name}"), weight))
    schedule = (MixtureStep(20, (3.0, 1.0, 0.0)), MixtureStep(50, (0.0, 1.0, 1.0)))
    config = dataclasses.replace(
        config, mixture=tuple(mixture), mixture_schedule=schedule, packing=BestFit(2), prefetch=2
    )
    assert [config.weights_at(batch) for batch in (0, 19, 20, 49, 50, 999)] == [
        (1.0, 3.0, 1.0), (1.0, 3.0, 1.0), (3.0, 1.0, 0.0), (3.0, 1.0, 0.0), (0.0, 1.0, 1.0), (0.0, 1.0, 1.0)
    ]  # fmt: skip
    iterator = make_iterator(config)
    batches, states = [], [iterator.get_state()]
    for _ in range(80):
        batches.append(next(iterator))
        states.append(iterator.get_state())
    iterator.close()
    for first, end, shares in (0, 20, (0.2, 0.6, 0.2)), (22, 50, (0.75, 0.25, 0)), (52, 80, (0, 0.5, 0.5)):
        tokens = np.zeros(3)
        for batch in batches[first:end]:
            for row, segments in zip(batch.tokens, batch.info.segments):
                for segment in range(1, segments.max() + 1):
                    here = row[segments == segment]
                    tokens[0 if 120 in here else 1 if 121 in here else 2] += len(here)
        np.testing.assert_allclose(tokens / tokens.sum(), shares, atol=0.02)
    for stop in (0, 19, 20, 21, 50, 63):
        again = make_iterator(config)
        again.set_state(json.loads(json.dumps(states[stop])))
        for batch in batches[stop : stop + 4]:
            np.testing.assert_array_equal(next(again).tokens, batch.tokens)
        assert again.get_state() == states[stop + 4]
        again.close()
    other = make_iterator(dataclasses.replace(config, mixture_schedule=schedule[:1]))
    with pytest.raises(ConfigError, match="mixture_schedule"):
        other.set_state(states[3])
    other.close()


def test_long_documents_come_more_often_and_the_mixture_stays(tmp_path):
    rng = np.random.default_rng(1)
    lengths = {"a": rng.integers(5, 60, 300), "b": rng.integers(5, 60, 200)}
    for name, each in lengths.items():
        lines = [json.dumps({"text": f"{i:04d}".ljust(n - 2, name)}) for i, n in enumerate(each)]  # n tokens in all
        (tmp_path / name).write_text("\n".join(lines))
    buckets = LengthBuckets(edges=(20, 40), weights=(0.25, 1.0, 2.5))
    mixture = tuple(
        Ingredient(Jsonl(f"{tmp_path}/{n}"), w, by_length=b) for n, w, b in (("a", 1.0, buckets), ("b", 3.0, None))
    )
    config = DataConfig(seq_len=64, batch_size=10, mixture=mixture, packing=OnePerRow())
    iterator = make_iterator(config)
    counts, tokens, states = {"a": Counter(), "b": Counter()}, Counter(), []
    while (epoch := iterator.get_state()["place"]["drawn"][0][0]) < 4:
        states.append(iterator.get_state())
        batch = next(iterator)
        for row, segments in zip(batch.tokens, batch.info.segments):
            name = chr(row[segments == 1][-1])
            if name not in counts:  # a text without filler
                continue
            counts[name][int(bytes(row[1:5].tolist()))] += 1
            tokens[name] += int((segments == 1).sum())
    again = make_iterator(dataclasses.replace(config, batch_size=5))
    again.set_state(states[-1])
    np.testing.assert_array_equal(np.concatenate([next(again).tokens, next(again).tokens]), batch.tokens)
    for each in iterator, again:
        each.close()
    assert epoch == 4 and tokens["b"] / (tokens["a"] + tokens["b"]) == pytest.approx(0.75, abs=0.02)
    bucket = np.searchsorted(buckets.edges, lengths["a"], side="right")
    for b, weight in enumerate(buckets.weights):
        often = np.array([counts["a"][i] for i in np.flatnonzero((bucket == b) & (lengths["a"] > 7))])
        # the last batch may have begun the fifth epoch; before it each came 4 w times
        assert often.min() >= 4 * weight and often.mean() == pytest.approx(4 * weight, rel=0.05)


def test_times_are_weights_in_every_run_of_epochs():
    from irope_jax.data.mixing import Times

    lengths = np.repeat([10, 100, 1000, 5000], [40, 30, 20, 1])
    buckets = LengthBuckets((100, 1000, 5000), (0.3, 1.0, 2.25, 0.0))
    times = Times(lengths, buckets, (1, 2))
    each = np.stack([times(epoch) for epoch in range(40)])
    weights = np.repeat(buckets.weights, [40, 30, 20, 1])
    total = np.cumsum(each, axis=0)
    epochs = np.arange(1, 41)[:, None]
    assert (np.abs(total - epochs * weights) < 1).all()
    for b in range(4):
        shown = each[:, weights == buckets.weights[b]].sum(1)
        assert (np.abs(shown - (weights == buckets.weights[b]).sum() * buckets.weights[b]) <= 1).all()
    assert (each[:, :70] <= 1).all() and len({tuple(row) for row in each[:10, :40]}) > 3
    with pytest.raises(ConfigError, match=r"weights.*documents have 10 to 5000 tokens"):
        Times(lengths, LengthBuckets((6000,), (0.0, 1.0)), (1,))


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: LengthBuckets((), (1.0,)), "edges"),
        (lambda: LengthBuckets((5, 5), (1.0, 1.0, 1.0)), "edges"),
        (lambda: LengthBuckets((5,), (1.0,)), "weights=.*1 edges make 2 buckets"),
        (lambda: LengthBuckets((5,), (0.0, 0.0)), "not all 0"),
        (lambda: Ingredient(Copy(), by_length=LengthBuckets((5,), (0.0, 1.0))), "by_length"),
        (lambda: MixtureStep(-1, (1.0,)), "start=-1"),
        (lambda: MixtureStep(0, (-1.0,)), "weights"),
        (lambda: DataConfig(mixture_schedule=(MixtureStep(0, (1.0, 1.0)),)), "mixture_schedule.0.weights"),
        (lambda: DataConfig(mixture_schedule=(MixtureStep(4, (1.0,)),) * 2), "mixture_schedule.1.start=4"),
    ],
)
def test_mistakes_name_the_field(make, words):
    with pytest.raises(ConfigError, match=words):
        make()
