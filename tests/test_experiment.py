"""Config files to an `Experiment`: what is resolved, what is refused, and how a mesh is filled in."""

import dataclasses
from pathlib import Path

import pytest

from irope_jax.core.config import ConfigError, fingerprint, to_dict
from irope_jax.experiment import check_devices, load_config, resolve
from irope_jax.sharding.mesh import MeshConfig

CONFIGS = Path(__file__).parent.parent / "configs"
SHIPPED = ["debug.py", "quickstart.py:irope", "quickstart.py:rope", "pretrain_tiny.py"]


def load(name, *overrides):
    return resolve(load_config(str(CONFIGS / name)), overrides)


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_configs_resolve_and_survive_the_way_through_plain_values(name):
    experiment = load(name)
    again = resolve(to_dict(experiment))
    assert again == experiment and fingerprint(again) == fingerprint(experiment)
    check_devices(experiment, 1)


def test_an_argument_reaches_get_config():
    assert [load(f"quickstart.py:{arm}").name for arm in ("irope", "rope")] == ["quickstart/irope", "quickstart/rope"]
    assert load("quickstart.py").name == "quickstart/irope"


def test_both_arms_of_the_quickstart_have_the_same_parameters_and_data():
    one, other = load("quickstart.py:irope"), load("quickstart.py:rope")
    assert dataclasses.replace(other.model, pattern=one.model.pattern) == one.model
    assert (one.data, one.evals) == (other.data, other.evals)


def test_overrides_change_what_they_name_and_the_fingerprint_with_it():
    plain = load("debug.py")
    changed = load("debug.py", ("train.steps", "7"), ("train.optimizer.schedule.warmup", "2"))
    assert (changed.train.steps, changed.train.optimizer.schedule.warmup) == (7, 2)
    assert fingerprint(changed) != fingerprint(plain)
    assert dataclasses.replace(changed, train=plain.train) == plain


def test_a_config_may_build_on_its_neighbour(tmp_path):
    (tmp_path / "base_of_a_test.py").write_text("NAME = 'from the neighbour'\n")
    text = "import base_of_a_test\ndef get_config():\n    return {'name': base_of_a_test.NAME}\n"
    (tmp_path / "x.py").write_text(text)
    assert load_config(str(tmp_path / "x.py")) == {"name": "from the neighbour"}


def test_the_free_axis_takes_the_devices_that_are_left():
    experiment = load("debug.py", ("mesh.fsdp", "2"), ("mesh.tensor", "2"))
    assert check_devices(experiment, 8) == MeshConfig(data=2, fsdp=2, tensor=2)


@pytest.mark.parametrize(
    ("field", "overrides"),
    [
        ("config.data.batch_size", [("mesh.fsdp", "4"), ("mesh.data", "2"), ("train.accumulate", "4")]),
        ("config.mesh.tensor", [("model.vocab_size", "301"), ("mesh.tensor", "2"), ("mesh.data", "4")]),
        ("config.mesh.fsdp", [("model.d_model", "30"), ("mesh.fsdp", "4")]),
        ("config.evals.1.lengths", [("evals.1.lengths", "(64, 65)"), ("mesh.context", "2")]),
    ],
)
def test_what_does_not_divide_by_its_axes_is_named(field, overrides):
    with pytest.raises(ConfigError) as error:
        check_devices(load("debug.py", *overrides), 8)
    assert error.value.field == field and any(word in error.value.fix for word in ("try", "use"))


def test_every_suggestion_of_a_size_works():
    with pytest.raises(ConfigError) as error:
        check_devices(load("debug.py", ("data.batch_size", "12")), 8)
    for size in ("8", "16"):
        assert size in error.value.fix
        check_devices(load("debug.py", ("data.batch_size", size)), 8)
