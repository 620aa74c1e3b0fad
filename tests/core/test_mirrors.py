"""Weights & Biases beside the run directory, with a stand-in for its package."""

import sys
import types

import pytest

from irope_jax.core.mirrors import MirrorMissingError, WandbConfig
from irope_jax.core.records import RunWriter


class Recorder:
    def __init__(self):
        self.inits, self.lines, self.finished = [], [], 0

    def init(self, **given):
        self.inits.append(given)
        return self

    def define_metric(self, *_, **__):
        pass

    def log(self, values):
        self.lines.append(values)

    def finish(self):
        self.finished += 1


def test_scalars_of_a_step_go_together_and_a_run_goes_on_under_its_id(tmp_path, monkeypatch):
    there = Recorder()
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=there.init))
    for _ in range(2):
        with RunWriter(tmp_path / "r", {"name": "n"}, "abcdef012345", tensorboard=False, wandb=WandbConfig()) as writer:
            writer.start(0)
            writer.train(1, {"loss": 2.0, "grad_norm": 1.0, "broken": float("nan")})
            writer.train(2, {"loss": 1.0})
            writer.measure(2, "perplexity", "nll", 3.0, 10, {"length": 64})
    one, other = there.inits
    assert one["id"] == other["id"] and one["id"].startswith("abcdef01-") and one["resume"] == "allow"
    assert one["name"] == "n" and one["config"] == {"name": "n"} and there.finished == 2
    assert there.lines[:2] == [
        {"step": 1, "train/loss": 2.0, "train/grad_norm": 1.0},
        {"step": 2, "train/loss": 1.0, "eval/perplexity/nll/length_64": 3.0},
    ]


def test_without_the_package_one_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(MirrorMissingError, match="pip install wandb"):
        RunWriter(tmp_path / "r", {}, "a", tensorboard=False, wandb=WandbConfig())
