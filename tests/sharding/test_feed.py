"""Which rows a process needs, on meshes whose devices are dealt to processes in several ways."""

from dataclasses import dataclass

import numpy as np
import pytest

from irope_jax.sharding.feed import global_array, row_block, rows_needed
from irope_jax.sharding.mesh import MeshConfig, make_mesh
from irope_jax.sharding.rules import batch_sharding

SHAPE = (8, 32)


@dataclass(frozen=True, eq=False)
class Device:
    process_index: int


class Dealt:
    """A sharding over this process's eight devices as if they were dealt to processes: `deal[i]` has device i."""

    def __init__(self, sharding, deal):
        self._sharding, self._deal = sharding, deal

    def devices_indices_map(self, shape):
        there = self._sharding.devices_indices_map(shape)
        return {Device(self._deal[device.id]): index for device, index in there.items()}


HALVES, PAIRS, ODD_AND_EVEN = (0, 0, 0, 0, 1, 1, 1, 1), (0, 0, 1, 1, 2, 2, 3, 3), (0, 1, 0, 1, 0, 1, 0, 1)


@pytest.mark.parametrize(
    "mesh, deal, blocks",
    [
        (dict(data=8), HALVES, [(0, 2), (1, 2)]),
        (dict(data=2, fsdp=4), HALVES, [(0, 2), (1, 2)]),
        (dict(data=2, context=4), HALVES, [(0, 2), (1, 2)]),
        (dict(data=1, context=8), HALVES, [(0, 1), (0, 1)]),
        (dict(data=2, context=4), PAIRS, [(0, 2), (0, 2), (1, 2), (1, 2)]),  # both axes across processes
        (dict(data=4, tensor=2), PAIRS, [(0, 4), (1, 4), (2, 4), (3, 4)]),
        (dict(data=1, fsdp=2, context=2, tensor=2), PAIRS, [(0, 2), (0, 2), (1, 2), (1, 2)]),
        (dict(data=4, context=2), ODD_AND_EVEN, [(0, 1), (0, 1)]),
        (dict(data=8), ODD_AND_EVEN, [None, None]),  # rows 0 2 4 6: no consecutive part
        (dict(data=8), (0, 1, 1, 0, 2, 2, 3, 3), [None, None, (2, 4), (3, 4)]),
        (dict(data=8), (0, 0, 0, 1, 1, 1, 2, 2), [None, None, (3, 4)]),  # three rows do not divide eight
    ],
)
def test_rows_of_each_process(mesh, deal, blocks):
    sharding = batch_sharding(make_mesh(MeshConfig(**mesh)))
    ranges = rows_needed(Dealt(sharding, deal), SHAPE)
    assert [row_block(ranges[process], SHAPE[0]) for process in range(len(blocks))] == blocks
    for process in range(len(blocks)):  # by counting
        seen = np.zeros(SHAPE[0], bool)
        for device, index in sharding.devices_indices_map(SHAPE).items():
            if deal[device.id] == process:
                seen[index[0]] = True
        needed = np.zeros(SHAPE[0], bool)
        for first, past in ranges[process]:
            assert not needed[first:past].any()
            needed[first:past] = True
        np.testing.assert_array_equal(needed, seen)


def test_a_global_array_of_the_rows_at_hand():
    whole = np.arange(8 * 32).reshape(SHAPE)
    sharding = batch_sharding(make_mesh(MeshConfig(data=4, context=2)))
    array = global_array(whole, sharding)
    np.testing.assert_array_equal(np.asarray(array), whole)
    assert array.sharding == sharding


def test_rows_that_are_not_there_are_an_error():
    sharding = batch_sharding(make_mesh(MeshConfig(data=4, context=2)))
    with pytest.raises(ValueError, match="needs rows 0 to 3, which are not among rows 8 to 15"):
        global_array(np.zeros(SHAPE), sharding, first_row=8, rows=16)
