"""The gates of `scripts/bench_memory.py`, at its own sizes: compiling takes a second or two and runs nothing."""

from scripts.bench_memory import measure_feed_forward, measure_loss_head


def test_loss_head_keeps_no_logits_at_no_extra_flops():
    found = measure_loss_head()
    assert found["pass"], found
    assert found["temp_ratio"] <= 0.06 and found["flop_ratio"] <= 1.01


def test_feed_forward_keeps_no_hidden_layer():
    found = measure_feed_forward()
    assert found["pass"], found
    assert found["temp_ratio"] <= 0.15 and found["flop_ratio"] <= 1.25
