"""The monoid of unfinished softmaxes."""

import jax
import jax.numpy as jnp
import numpy as np

from irope_jax.attention import Partial, finish, merge


def some(seed, blind=False):
    """Partial of random scores over three keys, for two queries of which one may see nothing."""
    random = np.random.default_rng(seed)
    score, value = random.normal(size=(1, 2, 2, 3)) * 30, random.normal(size=(1, 3, 2, 4))
    if blind:
        score[:, 1] = -np.inf
    top = score.max(-1)
    weight = np.exp(score - np.where(np.isinf(top), 0, top)[..., None])
    parts = (np.einsum("btns,bsnh->btnh", weight, value), top, weight.sum(-1))
    return Partial(*(jnp.asarray(x, jnp.float32) for x in parts))


def close(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-6)


def test_merge_is_associative_and_commutative():
    a, b, c = some(0), some(1, blind=True), some(2)
    close(merge(merge(a, b), c), merge(a, merge(b, c)))
    close(merge(a, b), merge(b, a))


def test_empty_is_neutral_exactly():
    empty = Partial.empty(1, 2, 2, 4)
    for a in (some(0), some(1, blind=True), empty):
        for merged in (merge(a, empty), merge(empty, a)):
            assert all((x == y).all() for x, y in zip(jax.tree.leaves(merged), jax.tree.leaves(a), strict=True))


def test_nothing_seen_gives_zero_and_no_nan():
    blind = merge(some(1, blind=True), some(2, blind=True))
    assert (finish(blind)[:, 1] == 0).all() and np.isfinite(finish(blind)).all()
    assert (blind.log_sum_exp[:, 1] == -jnp.inf).all()
    gradient = jax.grad(lambda out: finish(blind.replace(out=out)).sum())(blind.out)
    assert np.isfinite(gradient).all()


def test_merge_does_not_overflow():
    far = some(0).replace(max=jnp.full((1, 2, 2), 1e4))
    close(merge(far, some(1)), far)


def test_finish_in_the_type_asked_for():
    assert finish(some(0), jnp.bfloat16).dtype == jnp.bfloat16
