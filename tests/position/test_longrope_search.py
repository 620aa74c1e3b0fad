"""The search on planted objectives: it finds the optimum, keeps every rule, and goes on where it was cut."""

import dataclasses
import json
import math

import numpy as np
import pytest

from irope_jax.core.config import ConfigError, from_dict
from irope_jax.position.longrope_search import (
    Candidate,
    Evolution,
    SearchError,
    SearchLog,
    evolve,
    factors_json,
    initial_candidates,
    named_candidates,
)
from irope_jax.position.scaling import LongRoPE
from tests.oracles import scaling as oracle
from tests.quickly import keep

SHAPE = (16, 10000.0, 4.0, 64)  # head width, theta, factor, original length
SMALL = Evolution(population=24, parents=12, mutations=12, crossovers=12, iterations=60, step=0.1)
TARGET = (1.0, 1.0, 1.2, 1.5, 2.4, 3.3, 4.1, 4.6)


def planted(candidates):
    """Nought at TARGET with 4 first tokens."""
    return [
        sum(math.log(f / t) ** 2 for f, t in zip(c.factors, TARGET)) + 0.01 * abs(math.log2((1 + c.first_tokens) / 5))
        for c in candidates
    ]


def search(spec, score=planted, **options):
    return evolve(spec, initial_candidates(spec, *SHAPE), score, factor=4.0, **options)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_planted_optimum_is_found(seed):
    found = search(dataclasses.replace(SMALL, seed=seed))
    assert (found.best.factors, found.best.first_tokens) == (TARGET, 4)
    assert list(found.history) == sorted(found.history, reverse=True) and found.history[-1] == found.score
    assert min(planted(list(named_candidates(SMALL, *SHAPE).values()))) > 0.1  # where it started


@pytest.mark.parametrize("seed", range(5))
def test_every_candidate_ever_scored_keeps_the_rules(seed):
    spec, seen = Evolution(population=20, parents=8, mutations=8, crossovers=8, iterations=6, seed=seed), []

    def score(candidates):
        seen.extend(candidates)
        return np.random.default_rng(len(seen)).random(len(candidates)).tolist()

    found = search(spec, score)
    assert len(set(seen)) == len(seen) == found.evaluations <= spec.evaluations
    for candidate in seen:
        factors = candidate.factors
        assert list(factors) == sorted(factors) and factors[0] >= 1.0 and factors[-1] <= 1.25 * 4.0
        assert candidate.first_tokens in spec.first_tokens
        assert all(abs(f / 0.01 - round(f / 0.01)) < 1e-6 for f in factors)
    assert {c.first_tokens for c in seen} != {0}  # searched together with the factors


@pytest.mark.parametrize("shape", [SHAPE, (64, 10000.0, 8.0, 2048)])
def test_the_first_generation_has_pi_ntk_and_yarn(shape):
    spec = Evolution(population=10)
    named, first = named_candidates(spec, *shape), initial_candidates(spec, *shape)
    head_dim, theta, factor, length = shape
    unscaled = oracle.unscaled(head_dim, theta)
    formulas = {
        "pi": oracle.linear(head_dim, theta, factor),
        "ntk": oracle.ntk(head_dim, theta, factor),
        "yarn": oracle.yarn(head_dim, theta, factor, length),
    }
    for name, inv_freq in formulas.items():
        np.testing.assert_allclose(named[name].factors, unscaled / inv_freq, atol=0.0051)
    assert first[:3] == list(named.values()) and len(first) == 10 == len(set(first))


def test_scores_that_are_not_finite_lose_and_poison_nothing():
    def score(candidates):
        return [math.nan if c.steps[-1] % 2 else math.inf if c.factors[0] > 1.5 else s
                for c, s in zip(candidates, planted(candidates))]  # fmt: skip

    found = search(SMALL, score)
    assert math.isfinite(found.score) and found.best.steps[-1] % 2 == 0
    with pytest.raises(SearchError, match="finite loss"):
        search(SMALL, lambda candidates: [math.nan] * len(candidates))
    # An overflow downwards is no better than one upwards.
    found = search(SMALL, lambda candidates: [-math.inf if c.first_tokens else 1.0 for c in candidates])
    assert found.score == 1.0 and found.best.first_tokens == 0


def test_the_answer_depends_on_the_seed_and_on_nothing_else():
    def one_by_one(candidates):
        return [planted([candidate])[0] for candidate in candidates]

    found = search(SMALL)
    assert found == search(SMALL, one_by_one)
    # Another seed breeds differently from the very same first generation.
    other = evolve(dataclasses.replace(SMALL, seed=7), initial_candidates(SMALL, *SHAPE), planted, factor=4.0)
    assert other.history[0] == found.history[0] and other.history != found.history


def test_of_equal_scores_the_least_candidate_wins_whatever_the_order():
    first = initial_candidates(SMALL, *SHAPE)
    same = [
        evolve(dataclasses.replace(SMALL, iterations=0), order, lambda c: [1.0] * len(c), factor=4.0).best
        for order in (first, first[::-1])
    ]
    assert same == [min(first)] * 2


def test_progress_is_told_after_every_generation():
    told = []
    found = search(dataclasses.replace(SMALL, iterations=3), tell=lambda *what: told.append(what))
    assert [generation for generation, _, _ in told] == [0, 1, 2, 3]
    assert tuple(score for _, _, score in told) == found.history and told[-1][1] == found.best


class Killed(Exception):
    pass


@pytest.mark.parametrize("after", keep(30, of=(1, 30, 200)))
def test_a_search_that_was_cut_off_goes_on_to_the_same_answer(tmp_path, after):
    """Killed after so many scores, in the middle of a generation, with a line half written."""
    asked, path = {"what": "this"}, tmp_path / "scores.jsonl"
    whole, scored = search(SMALL), []

    def scoring(journal, limit):
        def score(candidates):
            found = []
            for candidate in candidates:
                if len(scored) == limit:
                    raise Killed
                found += planted([candidate])
                journal.add([candidate], found[-1:])
                scored.append(candidate)
            return found

        return score

    with SearchLog(path, asked) as journal, pytest.raises(Killed):
        search(SMALL, scoring(journal, after), known=journal.known)
    with path.open("a") as file:
        file.write('{"steps": [10, 1')
    with SearchLog(path, asked) as journal:
        assert len(journal.known) == after
        resumed = search(SMALL, scoring(journal, None), known=journal.known)
    assert resumed == whole
    assert len(scored) == len(set(scored)) == whole.evaluations  # nothing twice, nothing left out
    with SearchLog(path, asked) as journal:
        assert set(journal.known) == set(scored)


def test_scores_are_in_the_file_as_soon_as_they_are_added(tmp_path):
    """Not when it is closed: a kill closes nothing."""
    path, candidate = tmp_path / "scores.jsonl", Candidate((100, 120), 4)
    with SearchLog(path, {}) as journal:
        journal.add([candidate], [1.5])
        assert json.loads(path.read_text().splitlines()[-1])["score"] == 1.5


def test_a_torn_line_leaves_nothing_behind_however_long_it_was(tmp_path):
    path, candidate = tmp_path / "scores.jsonl", Candidate((100, 120), 4)
    SearchLog(path, {}).close()
    with path.open("a") as file:
        file.write('{"steps": [' + "100, " * 100)
    with SearchLog(path, {}) as journal:
        journal.add([candidate], [1.5])
    with SearchLog(path, {}) as journal:
        assert journal.known == {candidate: 1.5}
    assert len(path.read_text().splitlines()) == 2


def test_a_log_of_another_search_or_a_damaged_one_is_refused(tmp_path):
    path, candidate = tmp_path / "scores.jsonl", Candidate((100, 120), 4)
    with SearchLog(path, {"a": 1}) as journal:
        journal.add([candidate, Candidate((100, 121))], [1.5, math.nan])
    with SearchLog(path, {"a": 1}) as journal:
        assert journal.known == {candidate: 1.5, Candidate((100, 121)): math.inf}
    with pytest.raises(SearchError, match=r"another search.*--out"):
        SearchLog(path, {"a": 2})
    for damage in ('{"steps": 3}\n', "[]\n", "nonsense\n"):
        path.write_text(path.read_text().splitlines()[0] + "\n" + damage)
        with pytest.raises(SearchError, match="line 2"):
            SearchLog(path, {"a": 1})
    path.write_text('{"irope_')  # killed while the header was written
    with SearchLog(path, {"a": 1}) as journal:
        assert journal.known == {}


def test_tiny_spaces_run_out_instead_of_running_on():
    """Factors of 1 alone: one candidate per number of first tokens."""
    spec = Evolution(step=1.0, max_stretch=1.0, first_tokens=(0, 4), iterations=3, attempts=20)
    found = evolve(spec, [Candidate((1, 1), 0, 1.0)], lambda c: [float(x.first_tokens) for x in c], factor=1.0)
    assert found.best == Candidate((1, 1), 0, 1.0) and found.evaluations == 2


def test_the_result_is_a_scaling_for_configs_and_for_the_command_line():
    from ast import literal_eval

    values = factors_json(Candidate((100, 157, 250, 400), 16), original_length=64, factor=4.0, attention_policy="none")
    assert literal_eval(json.dumps(values)) == values
    scaling = from_dict(LongRoPE, json.loads(json.dumps(values)))
    assert scaling == LongRoPE(64, 4.0, (1.0, 1.57, 2.5, 4.0), first_tokens=16, attention_policy="none")


def test_wrong_settings_name_the_field_and_the_fix():
    for change, message in (
        (dict(population=0), "population=0"),
        (dict(iterations=-1), "iterations=-1"),
        (dict(probability=0.0), "probability"),
        (dict(step=0.0), "step"),
        (dict(max_stretch=0.9), "max_stretch"),
        (dict(first_tokens=()), "first_tokens"),
    ):
        with pytest.raises(ConfigError, match=message):
            Evolution(**change)
