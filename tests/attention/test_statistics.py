"""Statistics of attention: against probabilities written out in float64, by their properties, for every mask."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from irope_jax.attention.mask import Chunked, Global, Sliding
from irope_jax.attention.parts import KeySet
from irope_jax.attention.statistics import Attending, attention_statistics
from irope_jax.core.types import TokenInfo
from tests.oracles.attention import sees

LENGTH, SINKS, RECENT = 24, 2, 3
RULES = {
    "global": (Global(), dict(kind="global")),
    "chunked": (Chunked(5), dict(kind="chunked", size=5)),
    "by row": (Chunked(6, by="row"), dict(kind="chunked", size=6, by="row")),
    "sliding": (Sliding(4), dict(kind="sliding", size=4)),
}


def packed() -> tuple[TokenInfo, np.ndarray]:
    """Two rows: documents of 13 and 8 tokens and padding; one document. Places are (position, segment, row)."""
    positions = np.stack([np.r_[0:13, 0:8, 0, 0, 0], np.arange(LENGTH)])
    segments = np.stack([np.r_[[1] * 13, [2] * 8, 0, 0, 0], np.ones(LENGTH, int)])
    rows = np.broadcast_to(np.arange(LENGTH), positions.shape)
    info = TokenInfo(*(jnp.asarray(x, jnp.int32) for x in (positions, segments, rows)), first_row=0)
    return info, np.stack([positions, segments, rows], -1)


def attending(mask, slopes=None, info=None):
    info = packed()[0] if info is None else info
    rng = np.random.default_rng(0)
    q, k = (rng.normal(size=(2, LENGTH, heads, 8)).astype(np.float32) for heads in (4, 2))
    return Attending(info, mask, (KeySet(q, k, info, info, mask),), 0.7, slopes)


def statistics(of, block):
    return jax.tree.map(np.asarray, jax.jit(lambda of_: attention_statistics(
        Attending(of.info, of.mask, (of.sets[0]._replace(q_BTNH=of_[0], k_BSKH=of_[1]),), of.scale, of.slopes),
        sinks=SINKS, recent=RECENT, block=block,
    ))(of.sets[0][:2]))  # fmt: skip


@pytest.mark.parametrize("block", [3, 7, 64])
@pytest.mark.parametrize("name", RULES)
def test_probabilities_written_out_give_the_same(name, block):
    mask, rule = RULES[name]
    slopes = np.array([0.5, 0.25, 0.1, 0.0], np.float32) if name == "global" else None
    of, places = attending(mask, slopes), packed()[1]
    found = statistics(of, block)
    q, k = (np.asarray(x, np.float64) for x in of.sets[0][:2])
    for b, t in np.ndindex(2, LENGTH):
        here = tuple(places[b, t])
        keys = [s for s in range(LENGTH) if sees(q=here, k=tuple(places[b, s]), **rule)]
        assert found.visible[b, t] == len(keys)
        counted = [places[b, s, 2 if name == "by row" else 0] for s in keys]
        sinks = np.array([c % rule["size"] if rule["kind"] == "chunked" else c for c in counted]) < SINKS
        back = np.array([t - s for s in keys])
        for n in range(4):
            p = np.exp(
                [of.scale * q[b, t, n] @ k[b, s, n // 2] - (0 if slopes is None else slopes[n] * (t - s)) for s in keys]
            )
            p /= p.sum() or 1.0
            wanted = (p @ back, p[sinks].sum(), p[back < RECENT].sum(), -(p * np.log(p)).sum()) if keys else (0,) * 4
            got = [x[b, t, n] for x in (found.distance, found.sink_mass, found.recent_mass, found.entropy)]
            np.testing.assert_allclose(got, wanted, rtol=2e-6, atol=2e-6)
        even = (back.mean(), sinks.mean(), (back < RECENT).mean()) if keys else (0,) * 3
        got = [x[b, t] for x in (found.even_distance, found.even_sink_mass, found.even_recent_mass)]
        np.testing.assert_allclose(got, even, rtol=1e-6, atol=1e-6)


def test_even_attention_is_as_even_as_can_be():
    of = attending(Global())
    of = of._replace(sets=(of.sets[0]._replace(q_BTNH=np.zeros_like(of.sets[0].q_BTNH)),))
    found = statistics(of, 8)
    visible = np.maximum(found.visible, 1)
    np.testing.assert_allclose(found.entropy, np.log(visible)[..., None].repeat(4, -1), atol=1e-6)
    np.testing.assert_allclose(found.distance[1], np.arange(LENGTH)[:, None].repeat(4, -1) / 2, rtol=1e-6)
    np.testing.assert_allclose(found.distance, found.even_distance[..., None].repeat(4, -1), rtol=1e-6)


def test_no_chunk_is_looked_across_and_heads_keep_their_order():
    of = attending(Chunked(5))
    assert statistics(of, 4).distance.max() <= 4
    sharp = np.array(of.sets[0].q_BTNH)
    sharp[:, :, 2] = 0  # head 2 alone attends evenly
    found = statistics(of._replace(sets=(of.sets[0]._replace(q_BTNH=sharp),)), 4)
    even = np.isclose(found.entropy, np.log(np.maximum(found.visible, 1))[..., None], atol=1e-6).all((0, 1))
    assert even.tolist() == [False, False, True, False]


def test_parts_of_attention_are_one_softmax():
    """Near keys and far keys as two sets give what one set of all of them gives."""
    whole = attending(Global())
    near, info = whole.sets[0]._replace(mask=Sliding(4)), whole.info
    earlier = info.replace(rows=info.rows - 4, first_row=None)
    both = whole._replace(sets=(near, whole.sets[0]._replace(q_info=earlier)))
    run = lambda of: attention_statistics(of, sinks=SINKS, recent=RECENT, block=7)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), run(whole), run(both))
