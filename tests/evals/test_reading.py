"""Long rows read in pieces say what one forward pass says; and the last layer attends where something is asked only."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from irope_jax.core.numerics import assert_close
from irope_jax.data.documents import Document
from irope_jax.data.packing import batch_of
from irope_jax.evals.forward import Scorer
from irope_jax.evals.reading import one_document_a_row
from irope_jax.model.cache import CacheSpec, new_cache
from irope_jax.model.decoder import cached_hidden_states, init_params
from irope_jax.position.encoding import RoPE
from irope_jax.position.scaling import DynamicNTK
from tests import tiny

MODEL = tiny.experiment(("model.num_layers", "4")).model
LENGTH, PIECE = 70, 32


@pytest.fixture(scope="module")
def params():
    return jax.tree.map(
        lambda x: x.unbox() if hasattr(x, "unbox") else x,
        init_params(MODEL, jax.random.key(0)),
        is_leaf=lambda x: hasattr(x, "unbox"),
    )


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, MODEL.vocab_size, size).astype(np.int32) for size in (LENGTH + 1, 45)]
    return batch_of([Document(row, np.ones(len(row), np.float32)) for row in rows], LENGTH, 256, rows=2)


def test_losses_of_all_tokens(params, batch):
    whole, pieces = Scorer(MODEL), Scorer(MODEL, PIECE)
    real = np.asarray(batch.info.segments) > 0
    nll, right = whole.token_losses(params, batch)
    found, found_right = pieces.token_losses(params, batch)
    assert_close(found[real], nll[real], what="losses")
    np.testing.assert_array_equal(found_right[real], right[real])
    assert (found[~real] == 0).all()


def test_predictions_anywhere(params, batch):
    """Places in every piece, in one only, and at the borders of pieces."""
    whole, pieces = Scorer(MODEL), Scorer(MODEL, PIECE)
    for places in ([[0, 31, 32, 69], [3, 31, 32, 43]], [[66, 67, 68, 69], [40, 41, 42, 43]]):
        places = np.asarray(places)
        wanted = np.take_along_axis(np.asarray(batch.targets), places, axis=1)
        best, nll = whole.predictions(params, batch, places, wanted)
        found, found_nll = pieces.predictions(params, batch, places, wanted)
        np.testing.assert_array_equal(found, best)
        assert_close(found_nll, nll, what="losses")


def test_the_last_layer_attends_where_it_is_asked(params, batch):
    """Every key is kept, hidden states are right where asked; with nobody asking, what queries hold does not matter."""
    real = jnp.asarray(np.asarray(batch.info.segments) > 0)
    asked = jnp.zeros(real.shape, bool).at[0, 50].set(True)
    empty = new_cache(MODEL, CacheSpec(2, LENGTH, "float32"))
    info = empty.next_info(real)
    read = jax.jit(lambda asked: cached_hidden_states(MODEL, params, batch.tokens, info, empty, asked))
    hidden, _, cache = read(jnp.ones_like(real))
    found, _, kept = read(asked)
    assert_close(found[0, 50], hidden[0, 50], what="hidden states")
    assert not np.allclose(found[0, 49], hidden[0, 49])
    jax.tree.map(lambda a, b: assert_close(a, b, what="cache"), kept, cache)


def test_models_and_rows_that_no_cache_can_read_are_one_forward_pass(batch):
    layer = dataclasses.replace(MODEL.pattern[0], position=RoPE(scaling=DynamicNTK(4.0, original_length=64)))
    by_length = dataclasses.replace(MODEL, pattern=(layer, MODEL.pattern[1]))
    assert not Scorer(by_length, PIECE)._by_pieces(batch)
    assert Scorer(MODEL, PIECE)._by_pieces(batch)
    assert not Scorer(MODEL, LENGTH)._by_pieces(batch)
    moved = batch.replace(info=batch.info.replace(positions=batch.info.positions + 1))
    assert one_document_a_row(batch) and not one_document_a_row(moved)
