"""Tasks in words: their own reader finds the answer in the text alone, places are where they are said to be."""

import json
import re

import numpy as np
import pytest

from irope_jax.core.config import ConfigError, from_dict
from irope_jax.data.text_tasks.facts import COUNTS, STORIES, FactsTask, Story
from irope_jax.data.text_tasks.registry import (
    CopyLine,
    Facts,
    KeyValue,
    Numbers,
    PasskeyNoise,
    Rounds,
    Sandwich,
    TextTaskSpec,
    Variables,
)
from irope_jax.data.tokenizer import ByteTokenizer
from irope_jax.evals.answer_metrics import METRICS, after_mark, exact_start, first_number, labels_match, word_recall

BYTES = ByteTokenizer()
FAMILIES = (
    Facts(),
    KeyValue(),
    Numbers(),
    Numbers(4, 2),
    CopyLine(),
    Variables(),
    Rounds(),
    PasskeyNoise(),
    Sandwich(),
)
TASKS = {task.name: task for family in FAMILIES for task in family.members()}


def sample(name, length=6000, seed=0, depth=None):
    return TASKS[name].sample(np.random.default_rng(seed), length, BYTES, depth)


def read_facts(prompt):
    """Plays the story through once more, from its sentences in the text."""
    text, question = prompt.split("\n\nQuestion: ")
    question = question.split("\n")[0]
    place, holder = {}, {}
    telling = (
        r"(Agnes|Basil|Cora|Denis) (walked to the|picked up the|put down the) (\w+)\."
        r"|The (\w+) lies to the (\w+) of the (\w+)\."
    )
    lies = {}
    for who, what, where, there, side, of in re.findall(telling, text.split("\n\n", 1)[1]):
        if what.startswith("walked"):
            place[who] = where
        elif what.startswith("picked"):
            holder[where] = who
        elif what.startswith("put"):
            assert holder.pop(where) == who
        else:
            lies[side, of] = there
    if match := re.fullmatch(r"Where is (\w+)\?", question):
        return place[match[1]]
    if match := re.fullmatch(r"Where is the (\w+)\?", question):
        return place[holder[match[1]]]
    if match := re.fullmatch(r"Is (\w+) in the (\w+)\?", question):
        return "yes" if place[match[1]] == match[2] else "no"
    if match := re.fullmatch(r"How many things does (\w+) carry\?", question):
        return COUNTS[list(holder.values()).count(match[1])]
    if match := re.fullmatch(r"What does (\w+) carry\?", question):
        return " and ".join(thing for thing, who in holder.items() if who == match[1])
    side, of = re.fullmatch(r"What lies to the (\w+) of the (\w+)\?", question).groups()
    return lies[side, of]


def read(name, prompt):
    if name in STORIES:
        return read_facts(prompt)
    if name == "key_value":
        listed = json.loads(prompt.split("JSON data:\n")[1].split("\n\nKey")[0])
        return listed[re.search(r'Key: "(.+)"', prompt)[1]]
    if name.startswith("number"):
        asked = re.search(r"Question: What .* secret numbers? of (.+)\?", prompt)[1]
        keys = [key.removeprefix("the ") for key in re.split(r" and |, ", asked)]
        told = dict(re.findall(r"The secret number of the (.+?) is (\d+)\.", prompt))
        return ", ".join(told[key] for key in keys)
    if name == "copy_line":
        line = re.search(r"Copy line (\d+) ", prompt)[1]
        return re.search(rf"\nLine {line}: (.+)\n", prompt)[1]
    if name == "passkey_noise":
        first, again = re.search(r"The pass key is (\d+)\. Remember it\. (\d+) is the pass key\.\n", prompt).groups()
        assert first == again and prompt.endswith("\nWhat is the pass key? The pass key is")
        return first
    if name == "sandwich":
        return re.search(r"San Francisco is (.*) on a sunny day\.", prompt)[1]
    if name.startswith("variables"):
        value = re.findall(r"assigned the value (\d+)", prompt)[-1]
        names = re.findall(rf"VAR (\w+) = {value}", prompt.split("\n\n\n\n")[1])
        links = re.findall(r"VAR (\w+) = VAR (\w+)", prompt.split("\n\n\n\n")[1])
        for _ in links:
            names += [new for new, old in links if old in names and new not in names]
        return " ".join(names)
    mark, order, what = re.search(r"Begin with (\w+) and .* the (\w+) (\w+ about a \w+) that", prompt).groups()
    replies = re.findall(rf"User: Write a {what}\.\nAssistant: (.+)\n", prompt)
    return f"{mark} {replies[('first', 'second', 'third', 'fourth').index(order)]}"


@pytest.mark.parametrize("name", TASKS)
def test_one_who_reads_is_right_and_the_text_fills_the_length(name):
    for seed in range(6):
        task, found = TASKS[name], sample(name, seed=seed)
        assert METRICS[task.metric](f" {read(name, found.prompt)}", found) == 1.0, (name, seed)
        used = 1 + len(found.prompt.encode()) + task.room(BYTES)
        assert 6000 - 900 <= used <= 6000  # a unit less than fits; some sentences are long


@pytest.mark.parametrize("name", TASKS)
def test_the_same_seed_gives_the_same_question_and_another_seed_another(name):
    assert sample(name) == sample(name) and sample(name).prompt != sample(name, seed=1).prompt


@pytest.mark.parametrize("name", [name for name in TASKS if TASKS[name].has_depth])
@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_what_is_asked_for_stands_at_its_depth(name, depth):
    found = sample(name, 12_000, 3, depth)
    assert METRICS[TASKS[name].metric](read(name, found.prompt), found) == 1.0
    if name in STORIES:
        story = sample(name, 12_000, 3, depth)
        text = story.prompt.split("\n\n", 1)[1].split("\n\nQuestion")[0]
        place = _decisive(text, story.question)
    else:
        text = found.prompt
        place = text.index(found.answers[0])
    assert abs(place / len(text) - depth) < 0.12  # sentences differ in length


def _decisive(text, question):
    """Where the last sentence stands that could change the answer."""
    facts = [*re.finditer(r"(Agnes|Basil|Cora|Denis) (?:walked to|picked up|put down) the \w+\.", text)]
    if match := re.search(r"the (north|south|east|west) of the (\w+)", question):
        return re.search(rf"The \w+ lies to {re.escape(match[0])}\.", text).start()
    if match := re.search(r"Where is the (\w+)", question):
        taken = [fact for fact in facts if match[1] in fact[0]][-1]
        walked = [f for f in facts if f[0].startswith(f"{taken[1]} walked")][-1]
        return max(taken.start(), walked.start())
    person = re.search(r"Agnes|Basil|Cora|Denis", question)[0]
    return [fact for fact in facts if fact[1] == person][-1].start()


@pytest.mark.parametrize("name", STORIES)
def test_guessing_among_the_labels_is_right_by_chance(name):
    rng, right, chance = np.random.default_rng(0), 0.0, 0.0
    for seed in range(400):
        story: Story = STORIES[name](np.random.default_rng(seed), 10)
        guess = story.labels[rng.integers(len(story.labels))]
        right += labels_match(f" {guess}.", story.answers, story.labels, story.question)
        asked = [label for label in story.labels if label in story.question and label not in story.answers]
        chance += (len(story.answers) == 1) / len(story.labels)
        assert not asked or name == "directions"
    assert abs(right - chance) / 400 < 4 * (0.25 / 400) ** 0.5


def test_the_answers_of_yes_or_no_are_balanced_and_every_place_is_an_answer():
    answers = [STORIES["yes_or_no"](np.random.default_rng(seed), 10).answers[0] for seed in range(200)]
    assert 70 < answers.count("yes") < 130
    assert len({STORIES["two_facts"](np.random.default_rng(seed), 10).answers for seed in range(200)}) == 6


def test_metrics_of_labels_marks_and_copies():
    places = ("library", "cellar")
    assert labels_match(" In the cellar. Not the library.", ("cellar",), places, "Where is Cora?") == 1.0
    assert labels_match("cellar or library", ("cellar",), places, "Where is Cora?") == 0.0
    assert labels_match("the cellarage", ("cellar",), places, "") == 0.0
    assert labels_match("south of the library is the cellar", ("cellar",), places, "south of the library?") == 1.0
    assert after_mark("QX a b c", "a b c", "QX") == 1.0 and after_mark("a b c", "a b c", "QX") == 0.0
    assert 0.5 < after_mark("QX a b d", "a b c", "QX") < 1.0
    assert exact_start(" calm  boat\nand more", "calm boat") == 1.0 and exact_start("a calm boat", "calm boat") == 0.0
    assert first_number(" 123. 45", "123") == 1.0 and first_number("45, 123", "123") == 0.0
    assert first_number("none", "1") == 0.0
    assert word_recall("Eat a SANDWICH!", "eat a sandwich and sit") == 0.6


def test_passkeys_are_worded_as_in_the_paper_and_garbage_begins_anew_after_the_key():
    found = sample("passkey_noise", 900, depth=0.3)
    lines = found.prompt.split("\n")
    assert lines[0].endswith("I will quiz you about the important information there.") and len(lines) == 5
    assert lines[1].startswith("The grass is green. The sky is blue.") and lines[3].startswith("The grass is green.")
    assert abs(len(lines[1]) / (len(lines[1]) + len(lines[3])) - 0.3) < 0.01
    keys = {int(sample("passkey_noise", 900, seed).answers[0]) for seed in range(200)}
    assert len(keys) > 150 and 1 <= min(keys) < max(keys) <= 50_000 and max(keys) > 45_000


def test_configs_name_families_and_mistakes_are_said():
    assert from_dict(TextTaskSpec, dict(kind="numbers", told=8, asked=2)).members()[0].name == "numbers_2_of_8"
    for wrong, field in [
        (dict(kind="numbers", told=2, asked=3), "asked"),
        (dict(kind="rounds", same=1), "same"),
        (dict(kind="copy_line", words=0), "words"),
        (dict(kind="facts", only=("one_fct",)), "only"),
        (dict(kind="variables", hops=0), "hops"),
    ]:
        with pytest.raises(ConfigError) as error:
            from_dict(TextTaskSpec, wrong)
        assert error.value.field == f"config.{field}"
    with pytest.raises(ConfigError, match="did you mean 'one_fact'"):
        FactsTask("one_fat")
