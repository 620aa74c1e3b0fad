"""Gates of `scripts/check_gates.py` on programs that compile in seconds; rings of up to 256 in a second process.

Expected figures stand here as numbers or are counted token by token; nothing is run.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from irope_jax.attention.mask import Chunked, Sliding
from irope_jax.context.layout import ContextLayout
from scripts import check_gates
from scripts.gate_programs import Layer, Model, decoder, layer

ROOT = Path(__file__).parents[2]
SMALL = dict(query_heads=2, key_heads=2, width=16)
LARGE = """
import json, sys
from dataclasses import asdict
import jax
jax.config.update("jax_compilation_cache_dir", sys.argv[1])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
from scripts import check_gates as g
from scripts.gate_programs import Model
model = Model(64, 1_048_576, layers=4)
rows = g.b1(64) + g.c1(phases=("forward",)) + g.c5(timed=False, phases=("forward",))
rows += g.a3(model) + g.b4_train(model) + g.c4(model)
print(json.dumps([asdict(row) for row in rows]))
"""


@pytest.fixture(scope="module", autouse=True)
def second_process():
    """Started first, so that it compiles beside the tests of this process."""
    # what the compiler back end does to machine code changes no figure
    fast = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    env = os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count=512 {fast}", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", LARGE, str(ROOT / ".jax_cache")]
    process = subprocess.Popen(command, env=env, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    yield process
    process.kill()


@pytest.fixture(scope="module")
def large(second_process):
    out, errors = second_process.communicate(timeout=600)
    assert second_process.returncode == 0, errors[-3000:]
    return [check_gates.Row(**row) for row in json.loads(out)]


def hold(rows):
    assert rows
    assert not [row for row in rows if row.ok is not True], "\n".join(map(check_gates.line, rows))


def kilobytes_per_token(phase):
    return layer(Layer(8, 131_072, phase)).temp / 16_384 / 1000


def test_global_layers_compute_what_is_visible_and_no_more():
    pairs = 131_072 * 131_073 // 2
    for parts in (1, 8):
        cost = layer(Layer(parts, 131_072)).cost
        assert cost.unknown_trips == 0
        assert 1 <= cost.matmul_flops_max * parts / (4 * 4 * 128 * pairs) <= 1.0049
        assert cost.matmul_flops_min == cost.matmul_flops_max


def test_forward_and_backward_of_a_ring():
    """FLOPs and memory; the first hop of the backward pass is the forward pass's, so 14 + 28 - 2 shards are sent."""
    found = layer(Layer(8, 131_072, "both"))
    assert found.cost.matmul_flops_max * 8 / (14 * 4 * 128 * 131_072 * 131_073 / 2) <= 1.0049
    assert found.cost.matmul_flops_min == found.cost.matmul_flops_max
    assert found.cost.total_bytes / (16_384 * 4 * 128 * 4) == 40
    assert kilobytes_per_token("forward") <= 11
    assert kilobytes_per_token("both") <= 26


def test_chunks_compute_what_is_visible_and_no_more():
    cost = layer(Layer(8, 131_072, mask=Chunked(8192))).cost
    assert 1 <= cost.matmul_flops_max * 8 / (4 * 4 * 128 * 16 * 8192 * 8193 / 2) <= 1.04


def test_contiguous_rings_wait_for_each_other():
    """All but the first device compute at every hop what only some need; in zigzag all need the same (above)."""
    cost = layer(Layer(8, 4096, layout="contiguous", **SMALL)).cost
    waiting = cost.matmul_flops_max * 8 / (4 * 2 * 16 * 4096 * 4097 / 2)
    assert 2 - 1 / 8 <= waiting <= 2
    assert cost.matmul_flops_min < 0.2 * cost.matmul_flops_max


def test_a_ring_sends_each_key_once_forward_and_twice_backward():
    shard = 16_384 * 4 * 128 * 4
    assert layer(Layer(8, 131_072)).cost.collective_bytes == {"collective-permute": 14 * shard}
    alone = layer(Layer(8, 2048, "backward", **SMALL)).cost
    assert alone.collective_bytes == {"collective-permute": 28 * 256 * 2 * 16 * 4}


def test_a_ring_in_bfloat16_on_tpus():
    rows = check_gates.b2_tpu(piece=512)
    if rows[0].ok is None:
        pytest.skip(rows[0].measured)
    hold(rows)


def tokens_received(layout, length, halo):
    """Counted one by one: rows within `halo` before a run that lie on another device, over all devices."""
    order = layout.order(length).reshape(layout.parts, layout.runs_per_piece, -1)
    home = {int(row): device for device in range(layout.parts) for row in order[device].ravel()}
    starts = [(device, int(run[0])) for device in range(layout.parts) for run in order[device]]
    return sum(
        home[row] != device for device, first in starts for row in range(max(first - halo, 0), first)
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["contiguous", "zigzag"])
def test_local_layers_send_nothing_or_their_halo(kind):
    layout = ContextLayout(kind, 8)
    runs, kappa = 8 * layout.runs_per_piece, 2 * 2 * 16 * 4

    def total(length, phase, mask, near="halo"):
        return layer(Layer(8, length, phase, mask, kind, near=near, **SMALL)).cost.total_bytes * 8

    assert total(64 * runs, "both", Chunked(32), "auto") == 0
    assert 0 < total(48 * runs, "forward", Chunked(64)) <= 63 * runs * kappa
    received = tokens_received(layout, 48 * runs, 39) * kappa
    assert total(48 * runs, "both", Sliding(40)) == 2 * received


def test_only_global_layers_of_a_decoder_send_keys():
    """Weights, cut along the same axis, are gathered besides, and the look-up sends ids and columns."""
    model = Model(8, 1024, 64, layers=4, vocabulary=256, d_model=32, hidden=64, width=16)
    ours = decoder(model).cost
    shard = 128 * 2 * 16 * 4
    by = ours.bytes_by("layer", "phase", "kind")
    assert by.pop(("layer_3", "forward", "collective-permute")) == 14 * shard
    assert {layer for layer, _, _ in by} == {""} and sum(by.values()) == model.sync_bytes


def test_decoding_sends_partial_results_whatever_the_length():
    for length in (1024, 4096):
        cost = layer(Layer(8, length, queries=1, **SMALL)).cost
        assert cost.total_bytes == 2 * 7 / 8 * 2 * (16 + 2) * 4
    assert layer(Layer(8, 64, mask=Chunked(64), queries=1, **SMALL)).cost.total_bytes == 0


def test_memory_of_a_ring_grows_with_length_and_nothing_is_square():
    hold(check_gates.c2(131_072, 524_288, phases=("forward",)))


@pytest.mark.parametrize("gate", ["A3", "B1", "B4", "C1", "C4", "C5"])
def test_many_devices(large, gate):
    hold([row for row in large if row.gate == gate])
