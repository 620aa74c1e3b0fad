"""Stages read out of records written as the loop writes them."""

from irope_jax.core.records import RunWriter, load_run
from irope_jax.study.collect import load_arms, missing
from irope_jax.study.seeds import pooled_arm
from irope_jax.study.stages import stages_of, stages_table


def staged(directory, seed=0):
    config = {"name": "staged", "seed": seed, "stages": [{}], "train": {"steps": 9}, "evals": []}
    with RunWriter(directory, config, f"abc {seed}", tensorboard=False) as writer:
        writer.start(0, parameters=1)
        writer.event(0, "stage", number=0, stage="short", length=256, batch_size=4, at_most=9)
        for step in range(1, 4):
            writer.train(step, {"loss": 5.0 - step})
        writer.event(3, "gate", opens=True)
        for length, value, count in ((256, 2.0 + seed, 10), (1024, 3.0, 10)):
            writer.measure(3, "perplexity", "nll_by_length", value, count, {"length": length})
        for depth, value, count in ((0.0, 1.0, 1), (0.5, 0.0, 3)):
            writer.measure(3, "retrieval", "accuracy", value, count, {"length": 256, "depth": depth, "straddle": False})
        writer.event(3, "stage", number=1, stage="long", length=1024, batch_size=1, at_most=5)
        writer.start(3, parameters=1)  # killed, and begun again
        writer.event(3, "stage", number=1, stage="long", length=1024, batch_size=1, at_most=5)
        writer.train(4, {"loss": 1.0})
        writer.event(4, "gate", opens=False)
    return load_run(directory)


def test_a_run_of_stages_is_told_stage_by_stage(tmp_path):
    stages = stages_of(staged(tmp_path))
    assert [(one.name, one.begin, one.end, one.verdict) for one in stages] == [
        ("short", 0, 3, "gate"),
        ("long", 3, 4, "limit"),
    ]
    (arm,) = load_arms([tmp_path])
    assert (arm.training_length, arm.planned_steps, arm.finished) == (1024, None, False)
    table = stages_table(arm)
    assert table.columns[5:] == ("nats (perplexity) at 256", "nats (perplexity) at 1,024", "retrieval at 256")
    assert table.rows[0] == ("short", "256", "3", "gate", "2.000", "2.000 (7.39)", "3.000 (20.09)", "0.250")
    assert table.rows[1] == ("long", "1,024", "1", "limit", "1.000", "–", "–", "–")


def test_of_several_seeds_it_is_the_means(tmp_path):
    table = stages_table(pooled_arm(0, "arm", [staged(tmp_path / str(seed), seed) for seed in (0, 1)]))
    assert table.rows[0] == ("short", "256", "3", "gate", "2.000", "2.500 (12.18)", "3.000 (20.09)", "0.250")
    assert table.rows[1][:5] == ("long", "1,024", "1", "limit", "1.000")


def test_gates_end_seeds_at_different_steps_between_records_and_they_are_finished_all_the_same(tmp_path):
    runs = [staged(tmp_path / str(seed), seed) for seed in (0, 1)]
    assert any("not finished" in note for note in missing([pooled_arm(0, "arm", runs)]))
    for run, step in zip(runs, (6, 9)):
        with RunWriter(run.directory, run.config, run.fingerprint, tensorboard=False) as writer:
            writer.event(step, "finished", planned=9)
    arm = pooled_arm(0, "arm", [load_run(run.directory) for run in runs])
    assert arm.finished and not any("not finished" in note for note in missing([arm]))
