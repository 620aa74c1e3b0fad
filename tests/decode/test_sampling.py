"""Draws follow the probabilities that temperature and filters leave, and depend on seed, sample and position alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from irope_jax.core.config import ConfigError
from irope_jax.decode.sampling import Sampling, choose

P = np.array([0.05, 0.4, 0.02, 0.25, 0.15, 0.1, 0.03])


@pytest.mark.parametrize(
    ("spec", "weights"),
    [
        (Sampling(1.0), P),
        (Sampling(0.5), P**2),
        (Sampling(1.0, top_k=3), np.where(P >= 0.15, P, 0)),
        (Sampling(1.0, top_p=0.6), np.where(P >= 0.25, P, 0)),
        (Sampling(1.0, top_p=0.66), np.where(P >= 0.15, P, 0)),
        (Sampling(1.0, min_p=0.25), np.where(P >= 0.1, P, 0)),
        (Sampling(2.0, top_k=5, top_p=0.9, min_p=0.51), np.where(P >= 0.15, np.sqrt(P), 0)),
    ],
    ids=str,
)
def test_draws_follow_the_probabilities(spec, weights):
    """20,000 draws: three and a half standard deviations of each share, and nothing that was filtered out."""
    count = 20_000
    logits = jnp.broadcast_to(jnp.log(jnp.asarray(P, jnp.float32)) + 3.0, (count, len(P)))
    drawn = jax.jit(lambda: choose(spec, logits, jnp.arange(count) % 7, jnp.arange(count) // 7))()
    share, want = np.bincount(drawn, minlength=len(P)) / count, weights / weights.sum()
    assert (np.abs(share - want) <= 3.5 * np.sqrt(want * (1 - want) / count)).all(), (share, want)


def test_greedy_takes_the_largest_and_a_draw_depends_on_its_own_row_only():
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(4, 9)), jnp.float32)
    at = lambda *rows: (logits[jnp.array(rows)], jnp.array(rows), jnp.full(len(rows), 5))
    assert choose(Sampling(), *at(0, 1, 2, 3)).tolist() == np.argmax(logits, -1).tolist()
    spec = Sampling(1.0, top_p=0.9, seed=3)
    assert choose(spec, *at(2)).tolist() == choose(spec, *at(0, 1, 2, 3))[2:3].tolist()


@pytest.mark.parametrize(
    ("values", "field"),
    [
        (dict(temperature=-1.0), "temperature"),
        (dict(temperature=1.0, top_k=0), "top_k"),
        (dict(temperature=1.0, top_p=1.5), "top_p"),
        (dict(min_p=0.1), "min_p=0.1: filters draws"),
    ],
)
def test_what_means_nothing_is_named(values, field):
    with pytest.raises(ConfigError, match=field):
        Sampling(**values)
