import numpy as np
import pytest

from irope_jax.data.documents import Document, Pieces, TokenStore, Windows, tokenized
from irope_jax.data.sources import Corpus, TextFile
from irope_jax.data.tokenizer import ByteTokenizer

LENGTHS = np.array([1, 2, 9, 10, 11, 12, 19, 20, 21, 30, 35, 39, 40, 41, 47, 100, 1003])


def spans(pieces, epoch):
    return [pieces.span(epoch, i) for i in range(len(pieces))]


@pytest.mark.parametrize("length", [1, 2, 7, 10])
@pytest.mark.parametrize("epoch", range(5))
def test_each_target_is_in_exactly_one_piece(length, epoch):
    seen = [np.zeros(n, int) for n in LENGTHS]
    for document, first, count in spans(Pieces(LENGTHS, length, (3,)), epoch):
        assert 1 <= count <= length
        seen[document][first : first + count] += 1
    assert all((s == 1).all() for s in seen)


def test_short_documents_stay_whole():
    whole = {d: (first, count) for d, first, count in spans(Pieces(LENGTHS, 12, (0,)), 0) if LENGTHS[d] <= 12}
    assert whole == {d: (0, n) for d, n in enumerate(LENGTHS) if n <= 12}


@pytest.mark.parametrize("length", [7, 10])
@pytest.mark.parametrize("epoch", range(5))
def test_windows_are_whole_disjoint_and_leave_out_little(length, epoch):
    seen = [np.zeros(n, int) for n in LENGTHS]
    for document, first, count in spans(Windows(LENGTHS, length, (3,)), epoch):
        assert count == min(length, LENGTHS[document])
        assert first + count <= LENGTHS[document]
        seen[document][first : first + count] += 1
    for n, s in zip(LENGTHS, seen):
        assert s.max() == 1 and (s == 0).sum() < (2 * length if n > length else 1)


@pytest.mark.parametrize("cut", [Pieces, Windows])
@pytest.mark.parametrize("targets", [100, 101, 149, 150, 199])
def test_cuts_fall_elsewhere_in_every_epoch(cut, targets):
    cuts = cut(np.array([targets * 10]), 100, (1, 2))
    offsets = {spans(cuts, epoch)[1][1] for epoch in range(200)}
    assert len(offsets) > 35  # at least half of 100 offsets are possible; 200 draws find most of them
    assert spans(cuts, 7) == spans(cut(np.array([targets * 10]), 100, (1, 2)), 7)


def test_store_holds_bos_text_eos(tmp_path):
    (tmp_path / "a.txt").write_text("ab|c")
    store = tokenized(TextFile(f"{tmp_path}/a.txt", "|"), ByteTokenizer())
    assert [store[i].tolist() for i in range(len(store))] == [[256, 97, 98, 257], [256, 99, 257]]
    assert store.flat.dtype == np.uint16 and store.targets.tolist() == [3, 2]
    other = TokenStore(store.flat, np.array([0, 3, 7]))
    assert other.fingerprint != store.fingerprint


def test_tokenizing_happens_once():
    assert tokenized(Corpus(), ByteTokenizer(3)) is tokenized(Corpus("train"), ByteTokenizer(3))


def test_a_document_needs_two_tokens():
    for tokens, weights in ((1, 1), (3, 2), (0, 0)):
        with pytest.raises(ValueError, match="length >= 2"):
            Document(np.zeros(tokens, np.int32), np.zeros(weights, np.float32))
