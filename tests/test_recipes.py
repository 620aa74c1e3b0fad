"""Recipes: each resolves at full size as its paper says, and takes its shrunk stages. On eight devices."""

import json
from pathlib import Path

import jax
import pytest

from irope_jax import cli
from irope_jax import stages as stages_module
from irope_jax.core.config import ConfigError
from irope_jax.core.records import load_run
from irope_jax.evals.evaluator import Measurement
from irope_jax.experiment import check_devices, load_config, resolve
from irope_jax.model.cost import parameter_counts
from irope_jax.stages import stage_experiments
from tests.quickly import EVERYTHING

RECIPES = Path(__file__).parent.parent / "configs" / "recipes"
K = 1024

# As the papers and their published scripts have it: chips are ours, and so is what stands in the docstrings as chosen.
# Per stage: length, base of the layers that turn, tokens, peak rate.
FACTS = {
    "llama3_long": (256, [*((k * K, 5e5, 800e9 / 6, 3e-5) for k in (16, 32, 48, 64, 96, 128)),
                          (128 * K, 5e5, 40e6, 3e-5)]),
    "prolong": (128, [(64 * K, 8e6, 20e9, 1e-5), (512 * K, 1.28e8, 20e9, 5e-6)]),
    "qwen25_1m": (128, [(65_536, 1e6, 10e9, 1e-5), (131_072, 5e6, 10e9, 1e-5), (262_144, 1e7, 10e9, 1e-5)]),
    "smollm3": (48, [(32 * K, 2e6, 47.2e9, 2e-5), (64 * K, 5e6, 51.9e9, 2e-5)]),
    "swan": (64, [(32 * K, 5e5, 300e9, 1e-5), (32 * K, 5e5, 15e9, 1e-5)]),
    "drope": (64, [(4096, None, 10e9, 1e-4)]),
    "longrope": (64, [(128 * K, 1e4, 400 * 32 * 128 * K, 2e-5), (256 * K, 1e4, 600 * 32 * 256 * K, 2e-5)]),
}  # fmt: skip
BILLIONS = {
    "llama3_long": 8.03,
    "prolong": 8.03,
    "qwen25_1m": 7.62,
    "smollm3": 3.08,
    "swan": 8.03,
    "drope": 6.74,
    "longrope": 6.74,
}
CONVERSIONS = ("swan", "drope")
TRAINED = FACTS if EVERYTHING else ("prolong", "swan")
"""Whose shrunk stages are taken: a length and a kind of layer that change; all with IROPE_EVERY_TEST=1."""


def config(name: str, size: str) -> dict:
    return load_config(f"{RECIPES / name}.py:{size}")


def theta_of(stage):
    thetas = {layer.position.theta for layer in stage.model.layers if layer.position.kind == "rope"}
    assert len(thetas) <= 1
    return thetas.pop() if thetas else None


def test_there_is_a_row_for_every_recipe():
    assert set(FACTS) == {path.stem for path in RECIPES.glob("*.py")} - {"recipe_parts"}


@pytest.mark.parametrize("name", FACTS)
def test_full_size_is_what_the_paper_says_and_fits_its_chips(name):
    chips, rows = FACTS[name]
    values = config(name, "full")
    if name in CONVERSIONS:  # the stages check that the parameters of the source are those of the converted
        values = values | {"stages": ({"name": "source", "steps": 5000}, *values["stages"])}
    experiment = resolve(values)
    stages = stage_experiments(experiment)[name in CONVERSIONS :]
    assert len(stages) == len(rows)
    assert f"{chips} chips" in (RECIPES / f"{name}.py").read_text().replace("\n", " ")
    assert experiment.train.init_from.startswith("runs/")
    assert sum(parameter_counts(experiment.model).values()) / 1e9 == pytest.approx(BILLIONS[name], abs=0.005)
    for stage, (length, theta, tokens, rate) in zip(stages, rows, strict=True):
        check_devices(stage, chips)
        assert (stage.data.seq_len, theta_of(stage)) == (length, theta)
        batch = stage.data.seq_len * stage.data.batch_size
        # as many whole steps as take these tokens; scripts that say "20B" take 5 % more
        assert tokens * 0.999 <= stage.train.steps * batch < tokens * 1.05 + batch
        assert stage.train.optimizer.learning_rate == rate


def test_what_only_one_recipe_has():
    swan = stage_experiments(resolve(config("swan", "full")))[0].model
    assert [(la.position.kind, la.mask.width) for la in swan.pattern] == [("nope", None)] + 3 * [("rope", 512)]
    assert {la.position.kind for la in stage_experiments(resolve(config("drope", "full")))[0].model.layers} == {"nope"}
    smollm3 = resolve(config("smollm3", "full"))
    assert [i for i, la in enumerate(smollm3.model.layers) if la.position.kind == "nope"] == list(range(3, 36, 4))
    assert [stage.optimizer_state for stage in smollm3.stages] == ["carry", "reset"]
    long = resolve(config("llama3_long", "full"))
    for stage, one in zip(long.stages[:6], stage_experiments(long)):
        assert [c.within for c in stage.gate.conditions] == [0.005, None] and stage.gate.at_limit == "stop"
        assert stage.gate.conditions[1].at_least == 1.0 and max(one.evals[1].lengths) == one.data.seq_len
    assert long.stages[6].gate is None and stage_experiments(long)[6].train.optimizer.schedule.final == 0.0
    prolong = stage_experiments(resolve(config("prolong", "full")))
    shares = [{i.source.path.split("/")[1]: i.weight for i in stage.data.mixture} for stage in prolong]
    assert [sum(share.values()) for share in shares] == [100, 100]
    assert [shares[0][k] for k in ("repos_64k", "books_64k", "textbooks")] == [30, 30, 3]
    assert [shares[1][k] for k in ("repos_512k", "repos_64k", "books_512k", "books_64k")] == [15, 15, 5, 25]
    first, second = (stage.model.pattern[0].position.scaling for stage in stage_experiments(longrope("full")))
    assert (first.factor, second.factor) == (32, 64) and second.original_length == 4096


def longrope(argument: str):
    return resolve(config("longrope", argument))


def test_longrope_takes_factors_of_a_search(tmp_path):
    file = tmp_path / "factors.json"
    found = dict(kind="longrope", original_length=16, factor=32.0, long_factor=[1.5] * 8, first_tokens=4)
    file.write_text(json.dumps(found))
    (stage,) = stage_experiments(longrope(f"tiny,128k,{file}"))
    scaling = stage.model.pattern[0].position.scaling
    assert (scaling.long_factor, scaling.first_tokens, scaling.original_length) == ((1.5,) * 8, 4, 16)
    with pytest.raises(ConfigError, match="unknown stage '64k'"):
        longrope("tiny,64k")
    with pytest.raises(ConfigError, match="unknown size 'small'"):
        longrope("small")


def test_imported_names_the_tokenizer_beside_the_weights():
    tokenizer = config("qwen25_1m", "imported")["data"]["tokenizer"]
    assert tokenizer["path"] == "runs/qwen25-7b/tokenizer.json"


class Guess:
    """Measures what an evaluation would, without a model."""

    def __init__(self, spec):
        self.name, self._lengths = spec.name, spec.lengths
        self._measure = {"perplexity": "nll_by_length", "retrieval": "accuracy"}[spec.kind]

    def run(self, params):
        for length in self._lengths:
            yield Measurement(self._measure, 0.0, 1, {"length": length})


@pytest.fixture
def quickly(monkeypatch):
    """One device, programs compiled without care: what is compiled is used twice."""
    one = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda *_: one)
    monkeypatch.setattr(jax, "device_count", lambda *_: 1)
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.mark.parametrize("name", TRAINED)
def test_its_shrunk_stages_train(name, tmp_path, monkeypatch, quickly):
    monkeypatch.setattr(stages_module, "build_evaluators", lambda specs, *_: [Guess(spec) for spec in specs])
    small = ["--config.model.attention=reference", "--config.data.prefetch=0"]
    assert cli.main(["train", f"--config={RECIPES / name}.py:tiny", f"--run-dir={tmp_path / 'run'}", *small]) == 0
    run = load_run(tmp_path / "run")
    wanted = [stage["name"] for stage in config(name, "full")["stages"]]
    assert [event.details["stage"] for event in run.events if event.name == "stage"][-len(wanted) :] == wanted
    experiment = resolve(config(name, "tiny"))
    assert run.events[-1].name == "finished" and run.events[-1].step == 2 * len(experiment.stages)
    gates = [event.details["opens"] for event in run.events if event.name == "gate"]
    assert gates == [False] * sum(stage.gate is not None for stage in experiment.stages)  # the passkey is not found
