"""Where the time of a run went, by its records."""

import math
from pathlib import Path

from irope_jax.core.records import Event, Run
from irope_jax.study.goodput import goodput, seconds_spent


def run(*events):
    return Run(Path("r"), {}, "", events=[Event(0, time, name, details) for time, name, details in events])


def test_shares_of_a_run_that_was_never_cut():
    found = seconds_spent(
        run(
            (10, "start", {"before": None}),
            (20, "spent", {"steps": 8.0, "compile": 4.0}),
            (30, "spent", {"steps": 9.0, "data": 1.0}),
        )
    )
    assert found == {"steps": 17.0, "compile": 4.0, "data": 1.0} and math.isclose(goodput(found), 17 / 22)


def test_what_a_killed_process_did_not_save_is_lost_and_the_time_until_the_next_one_is_away():
    found = seconds_spent(
        run(
            (10, "start", {"before": None}),
            (20, "spent", {"steps": 10.0}),
            (103, "start", {"before": 25.0}),  # killed at 25; the next process began at 100
            (110, "spent", {"steps": 6.0, "start-up": 4.0}),
            (120, "spent", {"steps": 10.0}),
        )
    )
    assert found == {"steps": 26.0, "start-up": 4.0, "lost": 5.0, "away": 75.0} and math.isclose(
        goodput(found), 26 / 35
    )


def test_a_run_that_tells_nothing():
    assert seconds_spent(run((1, "start", {}))) == {} and math.isnan(goodput({}))
