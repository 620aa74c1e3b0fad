"""Time and memory by length: what is counted exactly is compared with closed forms; times only have to be there."""

import jax
import numpy as np
import pytest

from irope_jax.core.config import ConfigError
from irope_jax.core.peak import PeakMemory
from irope_jax.data.tokenizer import ByteTokenizer
from irope_jax.evals.cost import Cost
from irope_jax.model.cache import CacheSpec, cache_bytes, row_bytes
from irope_jax.sharding.mesh import MeshConfig, make_mesh
from irope_jax.train.state import fresh_params
from tests import tiny

MODEL = tiny.experiment().model
LOCAL, FAR = MODEL.pattern


def measured(params, **changes):
    spec = Cost(lengths=(40, 64), tokens=3, repeats=2, piece=16, **changes)
    found = {}
    for m in spec.build(MODEL, ByteTokenizer()).run(params):
        found[m.name, m.where["length"]] = (m.value, m.count)
    return found


@pytest.mark.parametrize("pattern", [None, (FAR,)], ids=["the model", "all global"])
def test_what_is_measured_at_each_length(pattern):
    mesh = make_mesh(MeshConfig(data=1), devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        found = measured(fresh_params(MODEL, mesh, 0), pattern=pattern)
    model = MODEL if pattern is None else Cost(pattern=pattern).build(MODEL, ByteTokenizer())._model
    assert model.pattern == (pattern or MODEL.pattern)
    for length in (40, 64):
        spec = CacheSpec(1, length + 3, "bfloat16")
        held = sum(kind.total for kind in cache_bytes(model, spec)) + row_bytes(spec)
        assert found["cache_bytes", length] == (held, 1)
        assert found["prefill_seconds", length][1] == 2 and found["token_seconds", length][1] == 6
        assert all(found[name, length][0] > 0 for name in ("prefill_seconds", "token_seconds"))


def test_the_peak_is_what_was_held_on_top_and_not_what_came_before():
    before = np.ones(8_000_000)
    del before
    watch = PeakMemory()
    if watch.bytes_since() is None:
        pytest.skip("this system does not say")
    held = np.ones(4_000_000)  # 32 MB
    del held
    assert 25e6 < watch.bytes_since() < 60e6


def test_lengths_are_given_from_short_to_long():
    with pytest.raises(ConfigError, match="from short to long"):
        Cost(lengths=(64, 32))
