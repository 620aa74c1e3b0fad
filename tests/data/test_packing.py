import copy
import json

import numpy as np
import pytest

from irope_jax.core.config import ConfigError
from irope_jax.core.types import TokenInfo
from irope_jax.data.documents import Document
from irope_jax.data.packing import BestFit, BestFitPlanner, batch_of, check_promise, pack_rows


def document(*tokens, weight=1.0):
    return Document(np.array(tokens, np.int32), np.full(len(tokens), weight, np.float32))


def plan_all(lengths, seq_len, spec):
    planner, rows = BestFitPlanner(seq_len, spec), []
    for name, length in enumerate(lengths):
        rows += filter(None, [planner.add(name, length)])
    return rows, planner


def test_packing_picture():
    a, b, c = document(1, 2, 3, 4), document(5, 6, 7, weight=0.5), document(8, 9)
    batch = pack_rows([[(0, a), (4, b)], [(0, c)]], 7, 0, 4)
    picture = {
        "tokens": [[1, 2, 3, 0, 5, 6, 0], [8, 0, 0, 0, 0, 0, 0]],
        "targets": [[2, 3, 4, 0, 6, 7, 0], [9, 0, 0, 0, 0, 0, 0]],
        "weights": [[1, 1, 1, 0, 0.5, 0.5, 0], [1, 0, 0, 0, 0, 0, 0]],
        "positions": [[0, 1, 2, 0, 0, 1, 0], [0, 0, 0, 0, 0, 0, 0]],
        "segments": [[1, 1, 1, 0, 2, 2, 0], [1, 0, 0, 0, 0, 0, 0]],
        "rows": [[0, 1, 2, 3, 4, 5, 6]] * 2,
    }
    for name, expected in picture.items():
        array = getattr(batch if hasattr(batch, name) else batch.info, name)
        assert type(array) is np.ndarray and array.dtype == (np.float32 if name == "weights" else np.int32)
        assert array.tolist() == expected, name
    assert (batch.info.first_row, batch.info.document_multiple) == (0, 4)


def test_best_fit_picture():
    planner = BestFitPlanner(10, BestFit(open_rows=3))
    assert planner.add(0, 6) is planner.add(1, 7) is planner.add(2, 5) is None
    assert planner.add(3, 4) == [(0, 0), (3, 6)]  # 4 fits after 6 and after 5: 6 leaves least room and is full
    assert planner.add(4, 2) is None  # after 7, not after 5
    assert planner.names == [[[2, 0]], [[1, 0], [4, 7]]]
    assert planner.add(5, 10) == [(5, 0)]
    assert planner.add(6, 8) is None and planner.add(7, 10) == [(7, 0)]  # a whole row needs nobody's place
    assert planner.add(8, 9) == [(1, 0), (4, 7)]  # none fits: the fullest goes
    assert planner.names == [[[2, 0]], [[6, 0]], [[8, 0]]]


@pytest.mark.parametrize("multiple", [1, 8, 64])
@pytest.mark.parametrize("seed", range(4))
def test_plan_places_each_document_once_aligned_without_overlap(multiple, seed):
    rng, seq_len = np.random.default_rng(seed), 256
    lengths = rng.integers(1, seq_len + 1, 400)
    rows, planner = plan_all(lengths, seq_len, BestFit(open_rows=8, document_multiple=multiple))
    assert len(planner.names) <= 8
    rows += planner.names
    assert sorted(name for row in rows for name, _ in row) == list(range(400))
    for row in rows:
        end = 0
        for name, start in row:
            assert start >= end and start % multiple == 0
            end = start + lengths[name]
        assert end <= seq_len


@pytest.mark.parametrize("shape", ["uniform", "short", "long tail"])
def test_packing_wastes_little(shape):
    rng, seq_len = np.random.default_rng(0), 1024
    lengths = {
        "uniform": rng.integers(1, seq_len + 1, 4000),
        "short": rng.integers(1, 200, 20000),
        "long tail": np.minimum(seq_len, rng.lognormal(5, 1.2, 8000).astype(int) + 1),
    }[shape]
    rows, _ = plan_all(lengths, seq_len, BestFit())
    used = sum(lengths[name] for row in rows for name, _ in row)
    assert used / (len(rows) * seq_len) > {"uniform": 0.95, "short": 0.98, "long tail": 0.98}[shape]


@pytest.mark.parametrize("stop", [0, 1, 17, 100, 311])
def test_a_planner_goes_on_from_its_names(stop):
    lengths = np.random.default_rng(1).integers(1, 65, 400)
    spec = BestFit(open_rows=5, document_multiple=4)
    whole, _ = plan_all(lengths, 64, spec)
    rows, planner = plan_all(lengths[:stop], 64, spec)
    names = json.loads(json.dumps(planner.names))
    again = BestFitPlanner(64, spec)
    again.restore(names, lambda name: lengths[name])
    assert again.names == planner.names
    before = copy.deepcopy(names)
    for name in range(stop, 400):
        rows += filter(None, [again.add(name, lengths[name])])
    assert rows == whole and names == before


@pytest.mark.parametrize("multiple", [1, 16])
def test_nothing_leaks_between_documents(multiple):
    rng = np.random.default_rng(0)
    documents = [
        Document(rng.integers(0, 1000, n).astype(np.int32), rng.random(n).astype(np.float32))
        for n in rng.integers(2, 66, 200)
    ]
    rows, planner = plan_all([len(d.tokens) - 1 for d in documents], 64, BestFit(document_multiple=multiple))
    rows += [[tuple(member) for member in row] for row in planner.names]
    batch = pack_rows([[(start, documents[name]) for name, start in row] for row in rows], 64, 7777, multiple)
    seen = 0
    for b, row in enumerate(rows):
        assert set(batch.info.segments[b]) - {0} == set(range(1, len(row) + 1))
        for segment, (name, _) in enumerate(row, 1):
            here = batch.info.segments[b] == segment
            np.testing.assert_array_equal(
                np.r_[batch.tokens[b][here], batch.targets[b][here][-1]], documents[name].tokens
            )
            np.testing.assert_array_equal(batch.targets[b][here], documents[name].tokens[1:])
            np.testing.assert_array_equal(batch.weights[b][here], documents[name].weights[1:])
            np.testing.assert_array_equal(batch.info.positions[b][here], np.arange(here.sum()))
            assert (np.diff(np.flatnonzero(here)) == 1).all()
            seen += 1
    pad = batch.info.segments == 0
    assert seen == 200 and (batch.weights[pad] == 0).all() and (batch.tokens[pad] == 7777).all()
    assert (batch.info.positions[pad] == 0).all()


def test_one_document_per_row_with_padding_rows():
    batch = batch_of([document(1, 2, 3), document(4, 5, 6, 7)], 3, 0, rows=3)
    assert batch.tokens.tolist() == [[1, 2, 0], [4, 5, 6], [0, 0, 0]] and batch.info.document_multiple == 0
    with pytest.raises(ValueError, match="rows=1"):
        batch_of([document(1, 2), document(1, 2)], 3, 0, rows=1)


def test_the_promise_is_checked():
    a, b = document(1, 2, 3), document(4, 5)
    for start, multiple in ((2, 4), (2, 0), (3, 2)):
        with pytest.raises(
            ValueError, match=f"starts at row {start}, against the promise document_multiple={multiple}"
        ):
            pack_rows([[(0, a), (start, b)]], 8, 0, multiple)
    ones = np.ones((1, 3), np.int32)
    jump = TokenInfo(np.array([[0, 2, 3]]), ones, np.array([[0, 1, 2]]), document_multiple=1)
    with pytest.raises(ValueError, match="promise"):
        check_promise(jump)
    padded = TokenInfo(np.array([[0, 1, 0]]), np.array([[1, 1, 0]]), np.array([[0, 1, 2]]), document_multiple=0)
    check_promise(padded)


def test_overlap_and_overflow_are_errors():
    a = document(1, 2, 3)
    for rows in ([[(0, a), (1, a)]], [[(3, a)]]):
        with pytest.raises(ValueError, match="overlaps another or leaves"):
            pack_rows(rows, 4, 0, 1)
    for length in (0, 9):
        with pytest.raises(ValueError, match="a row has 8"):
            BestFitPlanner(8, BestFit()).add(0, length)
    for bad in ({"open_rows": 0}, {"document_multiple": 0}):
        with pytest.raises(ConfigError, match=next(iter(bad))):
            BestFit(**bad)
