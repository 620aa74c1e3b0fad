import dataclasses
import gc
import json
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import jax
import numpy as np
import pytest

from irope_jax.core.config import ConfigError
from irope_jax.data.config import DataConfig, Ingredient
from irope_jax.data.documents import tokenized
from irope_jax.data.haystacks import TextHaystack
from irope_jax.data.packing import BestFit, OnePerRow, Randomised
from irope_jax.data.pipeline import eval_text, make_iterator
from irope_jax.data.sources import Corpus, Jsonl, TextFile
from irope_jax.data.synthetic import Needle
from irope_jax.data.tokenizer import ByteTokenizer

TOKENIZER = ByteTokenizer(128)
SET = TOKENIZER.marker("set")
MIXED = DataConfig(
    seq_len=128,
    batch_size=4,
    mixture=(Ingredient(Corpus(), 3.0), Ingredient(Needle(TextHaystack(), num_facts=(1, 3)), 1.0)),
    tokenizer=TOKENIZER,
)
PACKED = DataConfig(
    seq_len=128,
    batch_size=4,
    mixture=(Ingredient(Corpus(), 3.0), Ingredient(Needle(num_facts=(1, 3), num_queries=(1, 3)), 1.0, (30, 100))),
    packing=BestFit(open_rows=6, document_multiple=8),
    tokenizer=TOKENIZER,
    prefetch=0,
)


@pytest.fixture
def open_iterator():
    """`make_iterator` whose iterators are closed when the test ends."""
    made = []

    def make(*args, **kwargs):
        made.append(make_iterator(*args, **kwargs))
        return made[-1]

    yield make
    for iterator in made:
        iterator.close()


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def assert_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("config", [MIXED, PACKED], ids=["one per row", "packed"])
def test_batches_have_the_promised_form(open_iterator, config):
    for batch in take(open_iterator(config), 20):
        assert batch.tokens.shape == batch.info.rows.shape == (4, 128)
        assert all(type(leaf) is np.ndarray for leaf in jax.tree.leaves(batch))
        assert batch.info.first_row == 0 and batch.info.document_multiple == config.packing.document_multiple
        starts = (batch.info.positions == 0) & (batch.info.segments > 0)
        assert (batch.info.rows[starts] % max(1, config.packing.document_multiple) == 0).all()
        if config is MIXED:
            assert (batch.info.segments == 1).all() and (batch.info.positions == batch.info.rows).all()


@pytest.mark.parametrize("config", [MIXED, PACKED], ids=["one per row", "packed"])
def test_the_seed_decides_the_stream(open_iterator, config):
    a, b = take(open_iterator(config), 5), take(open_iterator(config), 5)
    assert_equal(a, b)
    other = DataConfig(**{**vars(config), "seed": 1})
    assert (next(open_iterator(other)).tokens != a[0].tokens).any()


@pytest.mark.parametrize("prefetch", [0, 3])
@pytest.mark.parametrize("config", [MIXED, PACKED], ids=["one per row", "packed"])
def test_any_stop_goes_on_with_equal_batches(open_iterator, config, prefetch):
    config = DataConfig(**{**vars(config), "prefetch": prefetch})
    iterator = open_iterator(config)
    batches, states = [], [json.dumps(iterator.get_state())]
    for _ in range(60):
        batches.append(next(iterator))
        states.append(json.dumps(iterator.get_state()))
    used = open_iterator(config)
    for stop in (0, 1, 2, 7, 23, 40, 57):
        fresh = open_iterator(config)
        fresh.set_state(json.loads(states[stop]))
        assert json.dumps(fresh.get_state()) == states[stop]
        assert_equal(take(fresh, 3), batches[stop : stop + 3])
        assert json.dumps(fresh.get_state()) == states[stop + 3]
        used.set_state(json.loads(states[stop]))  # an iterator that was somewhere else, backwards too
        assert_equal(take(used, 2), batches[stop : stop + 2])


def test_stops_fall_inside_packing_buffers(open_iterator):
    iterator, waiting = open_iterator(PACKED), 0
    for _ in range(30):
        next(iterator)
        waiting += '"open": []' not in json.dumps(iterator.get_state()["place"])
    assert waiting > 20


def test_a_state_does_not_change_when_the_iterator_goes_on(open_iterator):
    iterator = open_iterator(PACKED)
    take(iterator, 5)
    state = iterator.get_state()
    before = json.dumps(state)
    take(iterator, 20)
    assert json.dumps(state) == before


@pytest.mark.parametrize("config", [MIXED, PACKED], ids=["one per row", "packed"])
@pytest.mark.parametrize("processes", [2, 4])
def test_processes_share_the_global_batch(open_iterator, config, processes):
    whole = open_iterator(config)
    parts = [open_iterator(config, process_index=i, process_count=processes) for i in range(processes)]
    for _ in range(5):
        pieces = take_each(parts)
        assert_equal(jax.tree.map(lambda *x: np.concatenate(x), *pieces), next(whole))
    states = {json.dumps(part.get_state()) for part in parts}
    assert len(states) == 1
    other = open_iterator(config, process_index=1, process_count=processes)  # restored under another number
    whole.set_state(json.loads(states.pop()))
    other.set_state(whole.get_state())
    rows = slice(4 // processes, 2 * 4 // processes)
    assert_equal(jax.tree.map(lambda x: x[rows], next(whole)), next(other))


def take_each(iterators):
    return [next(iterator) for iterator in iterators]


def write_documents(path, count, length):
    texts = [f"{i:03d}".ljust(length, chr(97 + i % 26)) for i in range(count)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return texts


def test_an_epoch_shows_each_document_once_in_a_new_order(open_iterator, tmp_path):
    write_documents(tmp_path / "x.jsonl", 30, 14)
    config = DataConfig(seq_len=15, batch_size=5, mixture=(Ingredient(Jsonl(f"{tmp_path}/x.jsonl")),))
    iterator = open_iterator(config)
    orders = []
    for _ in range(4):
        rows = np.concatenate([batch.tokens for batch in take(iterator, 6)])
        orders.append([int(bytes(row[1:4].tolist())) for row in rows])
        assert sorted(orders[-1]) == list(range(30))
        assert (rows[:, 0] == 256).all()
    assert len({tuple(order) for order in orders}) == 4


def test_a_packed_epoch_predicts_each_target_once(open_iterator, tmp_path):
    text = "".join(chr(0x100 + i) for i in range(300))
    (tmp_path / "a.txt").write_text(text)
    config = DataConfig(
        seq_len=64, batch_size=1, mixture=(Ingredient(TextFile(f"{tmp_path}/a.txt")),), packing=BestFit(open_rows=1)
    )
    iterator = open_iterator(config)
    seen = Counter()
    for batch in take(iterator, 200):
        real = (batch.weights > 0) & (batch.tokens >= 0xC0) & (batch.targets < 0xC0)
        seen.update(zip(batch.tokens[real].tolist(), batch.targets[real].tolist()))
    # first and second byte name a character of the text; none may be shown twice before all others were shown once,
    # but for the epoch under way and the piece that waits
    assert len(seen) == 300 and min(seen.values()) > 15 and max(seen.values()) - min(seen.values()) <= 2


@pytest.mark.parametrize("config", [MIXED, PACKED], ids=["one per row", "packed"])
def test_weights_of_the_mixture_are_shares_of_tokens(open_iterator, config):
    text = task = 0
    for batch in take(open_iterator(config), 150):
        for segments, tokens in zip(batch.info.segments, batch.tokens):
            for segment in range(1, segments.max() + 1):
                here = segments == segment
                is_task = SET in tokens[here]
                task, text = task + is_task * here.sum(), text + (not is_task) * here.sum()
    assert task / (task + text) == pytest.approx(0.25, abs=0.015)


def test_no_sample_comes_twice(open_iterator):
    config = DataConfig(seq_len=64, batch_size=8, mixture=(Ingredient(Needle(num_facts=(1, 2))),), tokenizer=TOKENIZER)
    rows = np.concatenate([batch.tokens for batch in take(open_iterator(config), 100)])
    assert len(np.unique(rows, axis=0)) == 800


def test_a_state_of_another_stream_is_refused(open_iterator, tmp_path):
    state = open_iterator(MIXED).get_state()
    for change, words in ({"seed": 5}, "seed"), ({"seq_len": 130}, "seq_len"):
        with pytest.raises(ConfigError, match=f"{words}.*same data config") as error:
            open_iterator(DataConfig(**{**vars(MIXED), **change})).set_state(state)
        assert "\n" not in str(error.value)
    fewer = (MIXED.mixture[0],)
    for change, words in ({"mixture": fewer}, "config.mixture"), ({"tokenizer": ByteTokenizer(129)}, "num_symbols"):
        with pytest.raises(ConfigError, match=words):
            open_iterator(DataConfig(**{**vars(MIXED), **change})).set_state(state)
    open_iterator(DataConfig(**{**vars(MIXED), "prefetch": 0})).set_state(state)
    with pytest.raises(ConfigError, match="version"):
        open_iterator(MIXED).set_state(state | {"version": 99})


def test_other_data_under_the_same_config_is_refused_and_a_moved_file_is_not(open_iterator, tmp_path):
    def config(name, texts):
        (tmp_path / name).write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        return DataConfig(seq_len=8, batch_size=2, mixture=(Ingredient(Jsonl(f"{tmp_path}/{name}")),))

    state = open_iterator(config("a", ["one", "two"])).get_state()
    open_iterator(config("b", ["one", "two"])).set_state(state)
    with pytest.raises(ConfigError, match="data"):
        open_iterator(config("c", ["one", "twO"])).set_state(state)


def test_batches_must_divide_over_processes():
    with pytest.raises(ConfigError, match="batch_size=4: must be a multiple of the 3 processes"):
        make_iterator(MIXED, process_count=3)
    with pytest.raises(ConfigError, match="process_index=2"):
        make_iterator(MIXED, process_index=2, process_count=2)


def test_close_ends_the_thread():
    before = threading.active_count()
    iterator = make_iterator(MIXED)
    next(iterator)
    assert threading.active_count() > before
    iterator.close()
    iterator.close()
    assert threading.active_count() == before
    with pytest.raises(ValueError, match="closed"):
        next(iterator)


def test_eval_windows_are_the_text_in_order():
    batches = list(eval_text(Corpus("validation"), TOKENIZER, 100, 7, batch_size=3))
    store = tokenized(Corpus("validation"), TOKENIZER)[0]
    tokens = np.concatenate([batch.tokens for batch in batches])
    targets = np.concatenate([batch.targets for batch in batches])
    assert [batch.tokens.shape for batch in batches] == [(3, 100)] * 3
    np.testing.assert_array_equal(tokens[:7].reshape(-1), store[:700])
    np.testing.assert_array_equal(targets[:7].reshape(-1), store[1:701])
    assert np.concatenate([batch.weights for batch in batches]).sum() == 700
    assert (batches[-1].info.segments[1:] == 0).all() and batches[0].info.document_multiple == 0
    with pytest.raises(ConfigError, match="the source has 4 windows of 100000 tokens"):
        eval_text(Corpus("validation"), TOKENIZER, 100_000, 5)


def test_a_document_shorter_than_the_row_is_padded(open_iterator, tmp_path):
    write_documents(tmp_path / "x.jsonl", 4, 5)
    config = DataConfig(
        seq_len=16, batch_size=4, mixture=(Ingredient(Jsonl(f"{tmp_path}/x.jsonl")),), packing=OnePerRow()
    )
    batch = next(open_iterator(config))
    assert (batch.info.segments.sum(1) == 6).all() and (batch.tokens[:, 6:] == 258).all()


def test_the_stream_is_fast_enough():
    start = time.perf_counter()
    iterator = make_iterator(DataConfig(seq_len=128, batch_size=32))
    next(iterator)
    assert time.perf_counter() - start < 2
    start = time.process_time()
    tokens = sum(batch.tokens.size for batch in take(iterator, 50))
    iterator.close()
    assert tokens / (time.process_time() - start) > 200_000


def test_a_program_may_end_without_closing():
    program = (
        "from irope_jax.data.config import DataConfig; from irope_jax.data.pipeline import make_iterator;"
        "iterator = make_iterator(DataConfig(seq_len=64, batch_size=1));"
        "[next(iterator) for _ in range(300)]; print('done')"
    )
    root = Path(__file__).parents[2]
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=root)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "done\n", "")


def test_a_forgotten_iterator_ends_its_thread():
    before = threading.active_count()
    iterator = make_iterator(MIXED)
    next(iterator)
    del iterator
    gc.collect()
    assert threading.active_count() == before


def test_randomised_positions_grow_are_drawn_per_document_and_change_nothing_else(open_iterator):
    drawn = dataclasses.replace(PACKED, positions=Randomised(1000))
    plain, ours = open_iterator(PACKED), open_iterator(drawn)
    parts = [open_iterator(drawn, process_index=process, process_count=2) for process in range(2)]
    starts = []
    for _ in range(3):
        a, b = next(plain), next(ours)
        for name in ("tokens", "targets", "weights"):
            np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
        np.testing.assert_array_equal(a.info.segments, b.info.segments)
        assert b.info.document_multiple == 1 and b.info.positions.max() >= 128
        same = (b.info.segments[:, 1:] == b.info.segments[:, :-1]) & (b.info.segments[:, 1:] > 0)
        assert (np.diff(b.info.positions, axis=1)[same] > 0).all()
        starts += [tuple(row[:5]) for row in b.info.positions]
        np.testing.assert_array_equal(np.concatenate([next(part).info.positions for part in parts]), b.info.positions)
    assert len(set(starts)) == len(starts)
    with pytest.raises(ConfigError, match=r"positions.limit=127.*seq_len=128"):
        dataclasses.replace(PACKED, positions=Randomised(127))
