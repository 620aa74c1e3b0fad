"""Which steps are traced, and to which part of a step an operation belongs."""

import jax
import jax.numpy as jnp
import pytest

from irope_jax.core.config import ConfigError
from irope_jax.plan.parts import Part, part_of, parts_of_program, seconds_by_part
from irope_jax.train.profile import Profiler, Steps


def test_steps_are_read_and_anything_else_is_refused():
    assert Steps.parse("20:5") == Steps(20, 5) and Steps.parse("20:5").last == 24 and Steps.parse("7") == Steps(7, 1)
    for text in ("", "0:5", "3:0", "3:", "a:b", "-1:2", "3:4:5"):
        with pytest.raises(ConfigError, match="--profile"):
            Steps.parse(text)


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("jit(f)/jvp(Decoder)/periods/layer_0/attention/attend/exp", Part("attention", "forward")),
        ("jit(f)/transpose(jvp(Decoder))/periods/layer_0/attention/dot", Part("attention projections", "backward")),
        ("jit(f)/transpose(jvp(Decoder))/checkpoint/layer_1/feed_forward/mul", Part("feed-forward", "backward")),
        ("jit(f)/jvp(loss)/exp", Part("output and loss", "forward")),
        ("jit(f)/optimizer/mul", Part("optimizer", "")),
        ("jit(f)/jvp(Decoder)/periods/layer_0/attention_norm/mul", Part("other", "forward")),
    ],
)
def test_parts_go_by_the_scopes_of_the_model(name, part):
    assert part_of(name) == part


def test_a_fusion_without_a_name_has_that_of_what_it_computes_or_stands_beside():
    text = """HloModule jit_f

%plain (o: f32[2]) -> f32[2] {
  %o = f32[2]{0} parameter(0)
  ROOT %n = f32[2]{0} negate(%o)
}

%inner (p: f32[2]) -> f32[2] {
  %p = f32[2]{0} parameter(0)
  ROOT %a = f32[2]{0} add(%p, %p), metadata={op_name="jit(f)/loss/add"}
}

ENTRY %branch (q: f32[2]) -> f32[2] {
  %q = f32[2]{0} parameter(0)
  %fused = f32[2]{0} fusion(%q), kind=kCustom, calls=%inner
  %bare = f32[2]{0} fusion(%fused), kind=kCustom, calls=%plain
  ROOT %r = f32[2]{0} multiply(%bare, %q), metadata={op_name="jit(f)/optimizer/mul"}
}
"""
    found = parts_of_program(text)
    assert found["fused"].name == "output and loss" and found["bare"].name == found["r"].name == "optimizer"


def test_a_trace_is_summed_by_part(tmp_path):
    def step(x):
        with jax.named_scope("optimizer"):
            y = jnp.sin(x @ x)
        with jax.named_scope("loss"):
            return jax.lax.fori_loop(0, 3, lambda _, y: jnp.tanh(y @ x), y)

    x = jnp.ones((128, 128))
    run = jax.jit(step)
    run(x).block_until_ready()
    profiler = Profiler(Steps(2, 2), tmp_path, seconds_by_part)
    asked = []
    for number in (1, 2, 3, 4):
        profiler.before(number)
        result = run(x)
        profiler.after(number, result, lambda: asked.append(1) or run.lower(x).compile().as_text())
    profiler.close()
    assert asked == [1]
    found = seconds_by_part(tmp_path, run.lower(x).compile().as_text())
    by_name = {part.name: seconds for part, seconds in found.items()}
    assert by_name["output and loss"] > 0 and by_name["optimizer"] > 0 and by_name.get("other", 0) < sum(found.values())
    with pytest.raises(FileNotFoundError):
        seconds_by_part(tmp_path / "nothing", "")
