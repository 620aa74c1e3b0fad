"""The grid of tasks in words: scores of those who know and those who do not, resuming, and a real model."""

import json

import jax
import numpy as np
import pytest

from irope_jax.core.config import ConfigError, from_dict
from irope_jax.core.records import RecordError
from irope_jax.data.documents import Document
from irope_jax.data.packing import batch_of
from irope_jax.data.text_tasks.registry import RULER_TASKS, CopyLine, Facts, KeyValue, Numbers, Ruler
from irope_jax.data.tokenizer import ByteTokenizer, TokenIds
from irope_jax.evals.answering import Answering, by_decoding, by_forward
from irope_jax.evals.cells import Cells, weights_mark
from irope_jax.evals.registry import EvalSpec, build_evaluators
from irope_jax.evals.text_tasks import TextTasks
from irope_jax.model.decoder import logits
from irope_jax.sharding.mesh import MeshConfig, make_mesh
from irope_jax.train.optimizer import make_optimizer
from irope_jax.train.state import init_state
from tests import tiny
from tests.evals.ruler_reader import read

TOKENIZER = ByteTokenizer(num_symbols=16)
MODEL = tiny.experiment().model
SMALL = TextTasks(tasks=(KeyValue(), Numbers()), lengths=(1024, 2048), depths=(0.0, 1.0), samples=3, prompts_at_once=2)


class Says:
    """Answers by `say(prompt in words)`; remembers what it was asked, and may be killed after some calls."""

    def __init__(self, say, calls=10**9):
        self.say, self.calls, self.asked = say, calls, []

    def answer(self, prompts, max_new_tokens, stop):
        if len(self.asked) >= self.calls:
            raise KeyboardInterrupt
        self.asked.append([len(prompt) + max_new_tokens for prompt in prompts])
        assert all(prompt[0] == TOKENIZER.bos_id for prompt in prompts)
        said = [TOKENIZER.encode(self.say(TOKENIZER.decode(prompt[1:])))[:max_new_tokens] for prompt in prompts]
        return [[*answer.tolist(), stop[0], 65, 65] for answer in said]  # what follows the end does not count


def run(spec, answerer, directory=None, params=None, name="says"):
    answering = Answering(lambda params: answerer, name)
    return list(spec.build(MODEL, TOKENIZER, answering, directory).run(params))


def know(spec):
    """Says the answers, looked up by the prompt in the questions of the evaluator itself."""
    evaluator = spec.build(MODEL, TOKENIZER)
    known = {s.prompt: " ".join(s.answers) for cell in evaluator.cells() for s in evaluator.questions(*cell)}
    return known.__getitem__


@pytest.mark.parametrize("length", [4096, 16_384])
def test_an_oracle_scores_1_on_all_of_ruler_and_its_length_is_effective(length):
    spec = TextTasks(lengths=(length,), samples=2)
    found = run(spec, Says(know(spec)))
    scores = {m.where["task"]: m.value for m in found if m.name == "score"}
    assert scores == dict.fromkeys(RULER_TASKS, 1.0) and {m.count for m in found if m.name == "score"} == {2}
    (suite,) = [m for m in found if m.name == "suite_score"]
    assert (suite.value, suite.count, suite.where) == (1.0, 26, {"suite": "ruler", "tasks": 13, "length": length})
    (effective,) = [m for m in found if m.name == "effective_length"]
    assert effective.value == length and effective.where == {"suite": "ruler", "tasks": 13, "threshold": 0.856}


def test_one_who_guesses_words_of_the_prompt_scores_next_to_nothing_and_has_no_effective_length():
    rng = np.random.default_rng(0)
    guess = lambda prompt: " ".join(rng.choice(prompt.split(), 3))
    found = run(TextTasks(lengths=(4096,), samples=4), Says(guess))
    (suite,) = [m for m in found if m.name == "suite_score"]
    assert suite.value < 0.25  # words of lists are common there; needles and documents are not guessed
    assert [m.value for m in found if m.name == "effective_length"] == [0.0]
    assert max(m.value for m in found if m.name == "score" and m.where["task"].startswith("niah")) <= 0.25


def test_the_effective_length_is_the_greatest_above_the_threshold():
    spec = TextTasks(tasks=(Facts(),), lengths=(1024, 2048, 3072), samples=2)
    know_all = know(spec)
    lengths = {}
    evaluator = spec.build(MODEL, TOKENIZER)
    for task, length, depth in evaluator.cells():
        lengths |= {s.prompt: length for s in evaluator.questions(task, length, depth)}
    found = run(spec, Says(lambda prompt: know_all(prompt) if lengths[prompt] <= 2048 else "nothing"))
    assert [m.value for m in found if m.name == "suite_score"] == [1.0, 1.0, 0.0]
    assert [m.value for m in found if m.name == "effective_length"] == [2048]


def test_the_grid_has_depths_where_a_task_has_one_and_prompts_fit_their_length():
    spec = TextTasks(tasks=(Ruler(only=("ruler_fwe",)), KeyValue()), lengths=(2048,), depths=(0.0, 0.5), samples=3)
    answerer = Says(lambda prompt: "")
    found = run(spec, answerer)
    assert [m.where for m in found] == [
        {"task": "ruler_fwe", "length": 2048},
        {"task": "key_value", "length": 2048, "depth": 0.0},
        {"task": "key_value", "length": 2048, "depth": 0.5},
    ]
    sizes = [size for call in answerer.asked for size in call]
    assert len(sizes) == 9 and all(1800 < size <= 2048 for size in sizes)


def test_questions_do_not_depend_on_the_other_cells():
    few = TextTasks(tasks=(Numbers(),), lengths=(2048,), depths=(1.0,), samples=2)
    one, many = few.build(MODEL, TOKENIZER), SMALL.build(MODEL, TOKENIZER)
    (cell,) = one.cells()
    assert one.questions(*cell) == many.questions(*cell)[:2]
    other = TextTasks(tasks=(Numbers(),), lengths=(2048,), seed=2).build(MODEL, TOKENIZER)
    assert other.questions(*cell)[:2] != one.questions(*cell)


def test_a_run_cut_short_goes_on_where_it_was(tmp_path):
    whole = run(SMALL, Says(know(SMALL)))
    first, second = Says(know(SMALL), calls=5), Says(know(SMALL))
    with pytest.raises(KeyboardInterrupt):
        run(SMALL, first, tmp_path, params={"w": np.ones(3)})
    assert run(SMALL, second, tmp_path, params={"w": np.ones(3)}) == whole
    assert len(second.asked) == 2 * 8 - 4  # two calls a cell; two whole cells were there, half a cell is done again
    third = Says(know(SMALL), calls=0)
    assert run(SMALL, third, tmp_path, params={"w": np.ones(3)}) == whole  # nothing is asked again
    (path,) = tmp_path.glob("*.jsonl")
    entry = json.loads(path.read_text().splitlines()[1])
    assert entry["wanted"] == [[said] for said in entry["said"]] and entry["scores"] == [1.0] * 3


def test_other_weights_seeds_and_ways_of_answering_are_other_results(tmp_path):
    asked = lambda: Says(lambda prompt: "")
    spec = TextTasks(tasks=(KeyValue(),), lengths=(1024,), samples=1)
    more = TextTasks(tasks=(KeyValue(), CopyLine()), lengths=(1024,), samples=1)
    runs = [
        (spec, dict(params={"w": np.ones(3)}), 1),
        (spec, dict(params={"w": np.ones(3)}), 0),
        (spec, dict(params={"w": np.arange(3.0)}), 1),
        (spec, dict(params={"w": np.ones(3)}, name="else"), 1),
        (TextTasks(tasks=(KeyValue(),), lengths=(1024,), samples=1, seed=5), dict(params={"w": np.ones(3)}), 1),
        (more, dict(params={"w": np.ones(3)}), 1),  # a larger grid asks only what is new
    ]
    for what, how, calls in runs:
        answerer = asked()
        run(what, answerer, tmp_path, **how)
        assert len(answerer.asked) == calls
    assert len(list(tmp_path.glob("*.jsonl"))) == 4


def test_a_torn_line_is_done_again_and_a_damaged_one_is_named(tmp_path):
    about = {"a": 1}
    with Cells(tmp_path, about) as cells:
        cells.add({"task": "x"}, {"scores": [1.0]})
        cells.add({"task": "y"}, {"scores": [0.5]})
    (path,) = tmp_path.glob("*.jsonl")
    path.write_bytes(path.read_bytes()[:-7])
    with Cells(tmp_path, about) as cells:
        assert cells.get({"task": "x"})["scores"] == [1.0] and cells.get({"task": "y"}) is None
        cells.add({"task": "y"}, {"scores": [0.25]})
    assert Cells(tmp_path, about).get({"task": "y"})["scores"] == [0.25]
    path.write_text(path.read_text().replace('"scores": [1.0]', '"scors": [1.0]'))
    with pytest.raises(RecordError, match="line 2"):
        Cells(tmp_path, about)


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RecordError, match="cannot be written"), Cells(tmp_path / "file" / "below", {}):
        pass


def test_the_mark_of_weights_is_the_same_on_any_mesh_and_another_after_an_update():
    experiment = tiny.experiment()
    optimizer = make_optimizer(experiment.train.optimizer, experiment.train.steps)
    params = init_state(MODEL, optimizer, make_mesh(MeshConfig(), jax.devices()[:1]), 0).params
    mark = weights_mark(params)
    sharded = init_state(MODEL, optimizer, make_mesh(MeshConfig(fsdp=8)), 0).params
    assert weights_mark(jax.device_get(params)) == mark == weights_mark(sharded)
    assert weights_mark(jax.tree.map(lambda x: x * 1.001, params)) != mark


def test_by_forward_is_greedy_for_prompts_of_any_length_and_stops():
    experiment = tiny.experiment(("model.init_std", "0.5"))
    optimizer = make_optimizer(experiment.train.optimizer, experiment.train.steps)
    model = experiment.model
    params = jax.device_get(init_state(model, optimizer, make_mesh(MeshConfig(), jax.devices()[:1]), 0).params)
    prompts = [TOKENIZER.encode("abcdefghijklmnop").tolist(), TOKENIZER.encode("xyz").tolist()]
    answerer = by_forward(model, TOKENIZER, multiple=32).of(params)
    answers = answerer.answer(prompts, 4, ())
    for prompt, answer in zip(prompts, answers, strict=True):
        whole = np.asarray([*prompt, *answer, 0], np.int32)
        batch = batch_of([Document(whole, np.ones(len(whole), np.float32))], 32, TOKENIZER.pad_id)
        best = np.asarray(logits(model, params, batch.tokens, batch.info))[0].argmax(-1)
        assert answer == best[len(prompt) - 1 : len(whole) - 2].tolist() and len(answer) == 4
    with jax.set_mesh(make_mesh(MeshConfig(data=4, context=2))):
        assert by_forward(model, TOKENIZER, multiple=32).of(params).answer(prompts, 2, ()) == [a[:2] for a in answers]
    decoding = by_decoding(model, "float32").of(params)
    assert decoding.answer(prompts, 4, ()) == answers
    assert decoding.answer(prompts, 4, (answers[0][1],))[0] == answers[0][: answers[0].index(answers[0][1])]
    stopped = answerer.answer(prompts, 4, (answers[0][1],))
    assert stopped[0] == answers[0][: answers[0].index(answers[0][1]) + 1]


def test_a_model_answers_through_the_registry():
    experiment = tiny.experiment()
    optimizer = make_optimizer(experiment.train.optimizer, experiment.train.steps)
    params = init_state(MODEL, optimizer, make_mesh(MeshConfig(), jax.devices()[:1]), 0).params
    spec = from_dict(
        EvalSpec, dict(kind="text_tasks", tasks=(dict(kind="copy_line", words=1),), lengths=(512,), samples=1)
    )
    (evaluator,) = build_evaluators([spec], MODEL, TOKENIZER)
    evaluator._tokenizer = TOKENIZER
    (found,) = evaluator.run(params)
    assert (found.name, found.value, found.count) == ("score", 0.0, 1)


def test_mistakes_are_said_before_a_run():
    for wrong, field in [
        (dict(samples=0), "samples"),
        (dict(depths=(1.5,)), "depths"),
        (dict(threshold=85.6), "threshold"),
        (dict(tasks=()), "tasks"),
        (dict(tasks=(KeyValue(), KeyValue())), "tasks"),
    ]:
        with pytest.raises(ConfigError) as error:
            TextTasks(**wrong)
        assert error.value.field == field
    with pytest.raises(ConfigError, match="niah_single_1: the question with its shortest text"):
        TextTasks(lengths=(512,)).build(MODEL, TOKENIZER)
    with pytest.raises(ConfigError, match="ruler_qa_squad: there is material for"):
        TextTasks(tasks=(Ruler(only=("ruler_qa_squad",)),), lengths=(4096, 4_000_000)).build(MODEL, TOKENIZER)
    with pytest.raises(ConfigError, match="there is no tokenizer"):
        TextTasks().build(MODEL, TokenIds(300))


def test_what_a_reader_says_is_scored_right_through_the_whole_grid():
    spec = TextTasks(tasks=(Ruler(only=("niah_multikey_2", "ruler_vt")),), lengths=(4096,), samples=2)
    name = lambda prompt: "niah" if "special magic" in prompt else "ruler_vt"
    found = run(spec, Says(lambda prompt: ", ".join(read(name(prompt), prompt))))
    assert [m.value for m in found if m.name == "score"] == [1.0, 1.0]
