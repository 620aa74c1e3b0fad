"""One compiled step over a cache, which is given up for the next; prefixes, which others share, are not."""

from __future__ import annotations

from collections.abc import Callable

import jax


def stepping(run: Callable) -> Callable:
    """`run(params, cache, *rest) -> (cache, *found)`, compiled; the cache that goes in must not be used again.

    Its attribute `lower`, called alike with shapes, gives the same as `jax.jit(…).lower`.
    """

    def step(params, own, prefix, *rest):
        cache, *found = run(params, own.replace(prefix=prefix), *rest)
        return cache.replace(prefix=None), *found

    compiled = jax.jit(step, donate_argnums=1)

    def call(params, cache, *rest):
        own, *found = compiled(params, cache.replace(prefix=None), cache.prefix, *rest)
        return own.replace(prefix=cache.prefix), *found

    call.lower = lambda params, cache, *rest: compiled.lower(params, cache.replace(prefix=None), cache.prefix, *rest)
    return call
