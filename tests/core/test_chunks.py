"""How tokens fall into chunks: pictures, and that nothing is lost."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from irope_jax.core.chunks import TokenChunks
from irope_jax.core.config import ConfigError


def picture(chunks: TokenChunks) -> list[str]:
    """Which chunk works on each token, a line per batch row."""
    x = jnp.zeros((chunks.batch, chunks.length), jnp.int32)
    which = chunks.fold(lambda out, i: chunks.put(out, jnp.full_like(chunks.take(out, i), i), i), chunks.split(x))
    return ["".join(str(c) for c in row) for row in np.asarray(chunks.join(which))]


@pytest.mark.parametrize(
    "batch, length, chunk, shards, drawn",
    [
        (1, 8, 4, (1, 1), ["01010101"]),
        (2, 8, 4, (1, 1), ["01230123"] * 2),  # four tokens a chunk, two of each row
        (2, 8, 4, (2, 1), ["01010101"] * 2),  # four tokens of each device's row
        (1, 8, 2, (1, 2), ["01010101"]),  # devices hold 0101 and 0101
        (1, 7, 4, (1, 1), ["0101010"]),  # padded
        (1, 10, 4, (1, 1), ["0123401234"]),  # a divisor rather than padding
        (3, 4, 100, (1, 1), ["0000"] * 3),
        (4, 2, 1, (1, 1), ["01"] * 4),  # one place of every row at least
    ],
)
def test_every_nth_token_of_each_piece(batch, length, chunk, shards, drawn):
    assert picture(TokenChunks.of(batch, length, chunk, shards)) == drawn


@pytest.mark.parametrize("length, chunk, shards", [(12, 5, (2, 3)), (13, 3, (2, 1)), (14, 3, (1, 2)), (1, 1, (1, 1))])
def test_join_undoes_split_and_take_reads_what_put_wrote(length, chunk, shards):
    x = np.random.default_rng(0).standard_normal((2, length, 3)).astype(np.float32)
    chunks = TokenChunks.of(2, length, chunk, shards)
    split = chunks.split(x)
    np.testing.assert_array_equal(chunks.join(split), x)

    @jax.jit
    def copy(source):
        return chunks.fold(lambda out, i: chunks.put(out, chunks.take(source, i), i), jnp.zeros_like(source))

    np.testing.assert_array_equal(copy(split), split)


@pytest.mark.parametrize("chunk, shards, field", [(0, (1, 1), "chunk"), (4, (3, 1), "shards"), (4, (1, 5), "shards")])
def test_impossible_cuts_are_refused(chunk, shards, field):
    with pytest.raises(ConfigError, match=field):
        TokenChunks.of(2, 12, chunk, shards)
