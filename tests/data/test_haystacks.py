import math
import time
from collections import Counter

import numpy as np
import pytest

from irope_jax.core.config import ConfigError
from irope_jax.data.haystacks import MarkovHaystack, TextHaystack
from irope_jax.data.sources import Corpus, TextFile, open_source
from irope_jax.data.tokenizer import ByteTokenizer

TOKENIZER = ByteTokenizer(4)


def test_text_haystack_is_a_piece_of_the_text():
    novels = open_source(Corpus())
    for seed in range(5):
        ids = TextHaystack().fill(np.random.default_rng(seed), 500, TOKENIZER)
        piece = bytes(ids.tolist())
        assert len(ids) == 500 and ids.dtype == np.int32
        assert sum(piece in novel.encode() for novel in novels) == 1


def test_text_haystack_longer_than_any_document(tmp_path):
    (tmp_path / "a.txt").write_text("abcdef|xy")
    haystack = TextHaystack(TextFile(f"{tmp_path}/a.txt", "|"))
    ids = haystack.fill(np.random.default_rng(0), 1000, TOKENIZER)
    assert len(ids) == 1000 and set(ids) <= set(b"abcdefxy") and len(set(ids)) == 8
    assert len(haystack.fill(np.random.default_rng(0), 0, TOKENIZER)) == 0


def test_every_window_is_equally_likely(tmp_path):
    (tmp_path / "a.txt").write_text("abcdefghij")
    haystack, rng = TextHaystack(TextFile(f"{tmp_path}/a.txt")), np.random.default_rng(0)
    windows = Counter(bytes(haystack.fill(rng, 4, TOKENIZER).tolist()) for _ in range(1400))
    assert sorted(windows) == [b"abcdefghij"[i : i + 4] for i in range(7)]
    assert list(windows.values()) == pytest.approx([200] * 7, abs=50)


def test_markov_follows_its_table_at_its_entropy():
    haystack = MarkovHaystack()
    walk = haystack.fill(np.random.default_rng(0), 400_000, TOKENIZER) - haystack.first_id
    assert walk.min() == 0 and walk.max() == 31
    counts = np.zeros((2, 32, 32))
    np.add.at(counts, (walk[:-2] % 2, walk[1:-1], walk[2:]), 1)
    conditional = counts / counts.sum(-1, keepdims=True).clip(1)
    by_rank = np.take_along_axis(conditional, haystack.successors, axis=-1)
    visited = counts.sum(-1) > 3000
    assert visited.sum() >= 32
    np.testing.assert_allclose(by_rank[visited], np.tile(haystack.probabilities, (visited.sum(), 1)), atol=0.04)
    joint = counts / counts.sum()
    measured = -(joint[joint > 0] * np.log(conditional[joint > 0])).sum()
    assert measured == pytest.approx(haystack.entropy, abs=0.01)
    assert haystack.entropy == pytest.approx(1.1097, abs=1e-3)
    # the last token alone does not suffice: an order-1 model stays clearly above
    order1 = counts.sum(0)
    p1 = order1 / order1.sum(-1, keepdims=True).clip(1)
    j1 = order1 / order1.sum()
    assert -(j1[j1 > 0] * np.log(p1[j1 > 0])).sum() > haystack.entropy + 0.2


def test_markov_parity_is_that_of_the_token_before_the_last():
    haystack = MarkovHaystack(states=4, probabilities=(0.7, 0.3))
    walk = haystack.fill(np.random.default_rng(1), 5000, TOKENIZER) - haystack.first_id
    for before, last, following in zip(walk, walk[1:], walk[2:]):
        assert following in haystack.successors[before % 2, last]


def test_markov_entropy_by_hand_and_table_is_part_of_the_task():
    assert MarkovHaystack(probabilities=(0.5, 0.5)).entropy == pytest.approx(math.log(2))
    assert (MarkovHaystack().successors == MarkovHaystack().successors).all()
    assert (MarkovHaystack(table_seed=1).successors != MarkovHaystack().successors).any()
    assert all(len(set(row)) == 4 for row in MarkovHaystack().successors.reshape(-1, 4).tolist())


def test_markov_mistakes():
    for bad in ({"probabilities": (0.5, 0.4)}, {"states": 3}, {"first_id": -1}, {"probabilities": (1.5, -0.5)}):
        with pytest.raises(ConfigError, match=next(iter(bad))):
            MarkovHaystack(**bad)
    with pytest.raises(ConfigError, match="first_id=230: must be at most 224"):
        MarkovHaystack(first_id=230).check(TOKENIZER)


@pytest.mark.parametrize("haystack", [MarkovHaystack(), TextHaystack()])
def test_a_million_tokens_take_less_than_a_second(haystack):
    rng = np.random.default_rng(0)
    haystack.fill(rng, 1, TOKENIZER)
    start = time.process_time()
    haystack.fill(rng, 1_000_000, TOKENIZER)
    assert time.process_time() - start < 1
