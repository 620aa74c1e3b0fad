"""Attention in several parts: one softmax over all of them, forward and backward, whatever the parts are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from irope_jax.attention.mask import Chunked, Global, Sliding
from irope_jax.attention.parts import KeySet, attend_parts
from irope_jax.attention.reference import attend_reference
from irope_jax.core.config import ConfigError
from irope_jax.core.numerics import assert_close
from irope_jax.core.types import TokenInfo

LENGTH, WIDTH = 40, 8


def arrays(seed=0):
    keys = jax.random.split(jax.random.key(seed), 3)
    return [jax.random.normal(key, (2, LENGTH, n, WIDTH)) for key, n in zip(keys, (4, 2, 2))]


def packed() -> TokenInfo:
    positions = np.concatenate([np.arange(17), np.arange(20), np.zeros(3, int)])
    segments = np.concatenate([np.full(17, 1), np.full(20, 2), np.zeros(3, int)])
    both = lambda x: jnp.broadcast_to(jnp.asarray(x, jnp.int32), (2, LENGTH))
    return TokenInfo(both(positions), both(segments), both(np.arange(LENGTH)), first_row=0)


def cut(info: TokenInfo, width: int) -> list[tuple[TokenInfo, TokenInfo, object]]:
    """A global mask as near keys and far ones."""
    far = info.replace(rows=info.rows - width, first_row=None, unbroken=False, document_multiple=1)
    return [(info, info, Sliding(width)), (far, info, Global())]


@pytest.mark.parametrize("impl", ["reference", "blockwise", None])
@pytest.mark.parametrize("info", [TokenInfo.single(2, LENGTH), packed()], ids=["one document", "packed"])
def test_parts_of_a_mask_are_the_mask(impl, info):
    q, k, v = arrays()

    def parts(q, k, v):
        return attend_parts([KeySet(q, k, *where) for where in cut(info, 6)], v, impl=impl)

    def whole(q, k, v):
        return attend_reference(q, k, v, info, info, Global(), scale=WIDTH**-0.5)

    weight = jax.random.normal(jax.random.key(9), q.shape)
    value = lambda f: jax.jit(jax.value_and_grad(lambda *a: (f(*a) * weight).sum(), argnums=(0, 1, 2)))(q, k, v)
    assert_close(parts(q, k, v), whole(q, k, v), what="outputs")
    assert_close(value(parts)[1], value(whole)[1], what="gradients", atol=2e-5)


def test_each_part_has_queries_and_keys_of_its_own():
    """Against one dense softmax in which far pairs score with the second pair of arrays."""
    (q, k, v), (q2, k2, _) = arrays(), arrays(1)
    info = TokenInfo.single(2, LENGTH)
    near, far = cut(info, 6)

    def ours(q, k, q2, k2, v):
        return attend_parts([KeySet(q, k, *near), KeySet(q2, k2, *far)], v)

    def dense(q, k, q2, k2, v):
        score = lambda q, k: jnp.einsum("btkgh,bskh->bkgts", q.reshape(2, LENGTH, 2, 2, WIDTH), k) * WIDTH**-0.5
        back = jnp.arange(LENGTH)[:, None] - jnp.arange(LENGTH)[None]
        both = jnp.where(back < 6, score(q, k), score(q2, k2))
        weights = jax.nn.softmax(jnp.where(back >= 0, both, -jnp.inf))
        return jnp.einsum("bkgts,bskh->btkgh", weights, v).reshape(q.shape)

    weight = jax.random.normal(jax.random.key(9), q.shape)
    value = lambda f: jax.jit(jax.value_and_grad(lambda *a: (f(*a) * weight).sum(), argnums=range(5)))(q, k, q2, k2, v)
    assert_close(ours(q, k, q2, k2, v), dense(q, k, q2, k2, v), what="outputs")
    assert_close(value(ours)[1], value(dense)[1], what="gradients", atol=2e-5)


def test_other_kernels_are_refused():
    q, k, v = arrays()
    info = TokenInfo.single(2, LENGTH)
    with pytest.raises(ConfigError, match=r"attention='splash'.*blockwise"):
        attend_parts([KeySet(q, k, info, info, Chunked(8))], v, impl="splash")
