"""RULER: our words are the harness's words, and its scores are those of whoever reads, or guesses."""

import gzip
import json
import random
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from irope_jax.core.config import ConfigError, from_dict, to_dict
from irope_jax.data.reading import SourceError
from irope_jax.data.text_tasks import ruler_lists, ruler_needles, ruler_questions
from irope_jax.data.text_tasks.questions import Gaps, HotpotFile, SquadFile, chosen_documents
from irope_jax.data.text_tasks.references import Dictionary, Verses
from irope_jax.data.text_tasks.registry import RULER_TASKS, Ruler
from irope_jax.data.text_tasks.sample import fill
from irope_jax.data.tokenizer import ByteTokenizer, TokenizerFile
from irope_jax.evals.answer_metrics import METRICS, string_match_all, string_match_part
from tests.evals.ruler_reader import read

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "ruler_prompts.json").read_text())["cases"]
BYTES = ByteTokenizer()
TASKS = {task.name: task for task in Ruler().members()}


def sample(name, length=4096, seed=0, tokenizer=BYTES, depth=None):
    return TASKS[name].sample(np.random.default_rng(seed), length, tokenizer, depth)


@pytest.fixture(scope="module")
def words_tokenizer(tmp_path_factory):
    """A BPE of our own from novels: about four letters to a token."""
    tokenizers = pytest.importorskip("tokenizers")
    from irope_jax.data.sources import Corpus, open_source

    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=3000, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator([open_source(Corpus("validation"))[0][:200_000]], trainer)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    bpe.save(str(path))
    return TokenizerFile(str(path))


@pytest.mark.parametrize("name", [name for name in RULER_TASKS if name.startswith("niah")])
def test_needle_prompts_are_the_harness_s(name):
    case = GOLDEN[name]
    if "sentences" in case:
        context = ruler_needles.join_sentences(case["sentences"], case["needles"], case["depths"])
    else:
        context = ruler_needles.join_lines(case["lines"], case["needles"], case["places"])
    task = TASKS[name]
    assert task.value == case["kind"] and len(case["queries"]) == task.queries
    assert ("sentences" in case) == (task.haystack == "essay") and len(case["answers"]) == task.queries * task.values
    assert len(case["needles"]) == task.keys * task.values
    assert ruler_needles.compose(context, case["kind"], case["queries"], len(case["answers"])) == case["prompt"]
    assert set(read(name, case["prompt"])) >= set(case["answers"])


def test_needles_and_noise_are_worded_as_the_harness_words_them():
    assert set(GOLDEN["niah_single_1"]["lines"]) == {ruler_needles.NOISE}
    for name in ("niah_single_1", "niah_multikey_3", "niah_multiquery"):
        kind, own = GOLDEN[name]["kind"], sample(name).prompt
        for text in (*GOLDEN[name]["needles"], re.search(r"One of .*?\.", own)[0]):
            key, value = re.fullmatch(rf"One of the special magic {kind} for (\S+) is: (\S+)\.", text).groups()
            assert ruler_needles.NEEDLE.format(type=kind, key=key, value=value) == text


def test_the_variable_prompt_is_the_harness_s():
    case = GOLDEN["ruler_vt"]
    statements = ruler_lists.assignments([case["names"]], [case["value"]])
    context = ruler_lists.tracking_text(case["noises"], statements, [case["places"]])
    # The harness's example is of its short form, whose noise is cut into sentences; ours is told like the question.
    assert ruler_lists.tracking_prompt(case["example"], context, case["value"], 5) == case["prompt"]
    assert read("ruler_vt", case["prompt"]) == case["names"]


def test_the_list_prompts_are_the_harness_s():
    case = GOLDEN["ruler_cwe"]
    assert ruler_lists.COMMON.format(context=ruler_lists.numbered(case["words"])) == case["prompt"]
    assert case["counts"] == {"4096": [3, 30], "600": [1, 6]}
    case = GOLDEN["ruler_fwe"]
    assert ruler_lists.FREQUENT.format(context=" ".join(case["words"])) == case["prompt"]
    counts = ruler_lists.frequent_counts(case["number"], case["vocabulary"])
    assert sorted(Counter(case["words"]).values(), reverse=True) == counts.tolist()
    assert read("ruler_fwe", case["prompt"]) == case["answers"]


@pytest.mark.parametrize("name", ["ruler_qa_squad", "ruler_qa_hotpot"])
def test_the_question_prompts_are_the_harness_s(name):
    case = GOLDEN[name]
    assert ruler_questions.answering_prompt(case["documents"], case["query"]) == case["prompt"]


def test_word_counts_are_ruler_s_where_the_length_has_room_for_them():
    counts = lambda length: sorted(
        set(Counter(re.findall(r"\d+\. (\S+)", sample("ruler_cwe", length).prompt)).values())
    )
    assert counts(3000) == [1, 6] and counts(16_384) == [3, 30]
    assert counts(4096) == [1, 6]  # bytes: forty words do not fit


@pytest.mark.parametrize("length", [4096, 16_384])
@pytest.mark.parametrize("name", RULER_TASKS)
def test_one_who_reads_scores_100_and_one_who_guesses_nothing(name, length):
    task, rng, guesses = TASKS[name], random.Random(0), []
    for seed in range(3):
        found = sample(name, length, seed)
        assert METRICS[task.metric](" ".join(read(name, found.prompt)), found) == 1.0
        words = re.findall(r"[\w-]+", found.prompt)
        guesses.append(METRICS[task.metric](rng.choice(words), found))
    # One random word of the prompt can be one of several answers, never all of them.
    assert np.mean(guesses) <= (0.1 if name == "ruler_cwe" else 1 / 3)


@pytest.mark.parametrize("name", RULER_TASKS)
def test_the_text_fills_the_length_and_no_more(name, words_tokenizer):
    for tokenizer in (BYTES, words_tokenizer):
        task, found = TASKS[name], sample(name, 4096, 5, tokenizer)
        used = 1 + len(tokenizer.encode(found.prompt)) + task.room(tokenizer)
        unit = {"noise": 91, "needles": 140, "essay": 20}.get(getattr(task, "haystack", ""), 100)
        unit = 900 if "qa" in name else 400 if name == "ruler_cwe" else unit
        assert 4096 - unit <= used <= 4096, (name, used)


@pytest.mark.parametrize("name", RULER_TASKS)
def test_the_same_seed_gives_the_same_question(name):
    assert sample(name) == sample(name)
    assert sample(name).prompt != sample(name, seed=1).prompt


@pytest.mark.parametrize("name", [name for name in RULER_TASKS if name.startswith("niah")])
def test_the_needle_asked_for_stands_at_its_depth(name):
    for depth in (0.0, 0.25, 1.0):
        found = sample(name, 16_384, 2, depth=depth)
        context = found.prompt.split("afterwards.\n")[1].split("\nWhat ")[0]
        places = [context.index(answer) / len(context) for answer in found.answers]
        near = 0.1 if TASKS[name].haystack == "essay" else 0.03  # there it is a share of the sentences
        assert min(abs(place - depth) for place in places) < near
        assert set(read(name, found.prompt)) == set(found.answers)


def test_tasks_without_a_place_refuse_a_depth_and_short_lengths_are_said():
    with pytest.raises(ConfigError, match="no single place"):
        sample("ruler_cwe", depth=0.5)
    with pytest.raises(ConfigError, match="its shortest text takes"):
        sample("niah_single_1", 256)
    with pytest.raises(ConfigError, match="larger source"):
        sample("ruler_qa_squad", 4_000_000)


def test_no_line_of_the_haystack_has_the_key_that_is_asked_for(monkeypatch):
    few = lambda rng, kind: f"key-{rng.integers(20)}" if kind == "words" else str(rng.integers(10**6, 10**7))
    monkeypatch.setattr(ruler_needles, "draw", few)
    found = sample("niah_multikey_2")
    assert read("niah_multikey_2", found.prompt) == list(found.answers)


def test_fill_finds_the_largest_number_whatever_the_shape():
    for cost in (lambda n: 3 * n + 7, lambda n: n * n, lambda n: 5 * (n // 10), lambda n: int(40 * n**0.5)):
        for length in (100, 777, 5000):
            found = fill(cost, length, 1)
            assert cost(found) <= length < cost(found + 1)


def test_scores_are_ruler_s():
    assert string_match_all("They are AB, cd\x00ef.", ["ab", "CD", "xy", "ef"]) == 0.75
    assert string_match_part("It is ab", ["xy", "Ab"]) == 1.0 and string_match_part("no", ["xy", "Ab"]) == 0.0


def test_published_question_files_are_read_as_ruler_reads_them(tmp_path):
    answered = {"question": "Who?", "answers": [{"text": "Ann"}, {"text": "Anna"}], "is_impossible": False}
    unanswered = {"question": "When?", "answers": [], "is_impossible": True}
    paragraphs = [{"context": "B Ann did.", "qas": [answered, unanswered]}, {"context": "A other", "qas": []}]
    (tmp_path / "squad.json").write_text(json.dumps({"data": [{"paragraphs": paragraphs}]}))
    found = SquadFile(str(tmp_path / "squad.json")).load()
    assert found.documents == ("A other", "B Ann did.")
    (question,) = found.questions
    assert (question.query, question.answers, question.gold, question.near) == ("Who?", ("Ann", "Anna"), (1,), (0,))
    row = {"question": "Where?", "answer": "Rome", "context": [["T", ["one. ", "two."]], ["S", ["three"]]]}
    (tmp_path / "hotpot.json").write_text(json.dumps([row]))
    found = HotpotFile(str(tmp_path / "hotpot.json")).load()
    assert found.documents == ("S\nthree", "T\none. two.") and found.questions[0].gold == (1, 0)
    with pytest.raises(SourceError, match="is not a SQuAD"):
        SquadFile(str(tmp_path / "hotpot.json")).load()
    with pytest.raises(SourceError, match="cannot be read"):
        SquadFile(str(tmp_path / "none.json")).load()


def test_verses_are_asked_for_by_words_that_one_verse_says(tmp_path):
    lines = ["John 3:1 a man", "John 3:16 so loved", "", "1 John 2:3 we know", "John 2:3 wine", "Jude1:25 a man"]
    (tmp_path / "verses.txt").write_text("\n".join(lines))
    found = Verses(str(tmp_path / "verses.txt")).load()
    assert found.documents == (*lines[:2], *lines[3:5], "Jude 1:25 a man")
    # "a man" is said twice; the answer "John 2:3" would be found in "1 John 2:3"
    assert [(q.query, q.answers, q.gold) for q in found.questions] == [
        ('Which verse says "so loved"?', ("John 3:16",), (1,)),
        ('Which verse says "we know"?', ("1 John 2:3",), (2,)),
    ]
    assert found.questions[0].near == (0, 2, 3, 4)
    (tmp_path / "other.txt").write_text("John 3:1 a man\n\nno verse at all\n")
    with pytest.raises(SourceError, match=r"other.txt:3: .*Genesis 1:1"):
        Verses(str(tmp_path / "other.txt")).load()
    (tmp_path / "same.txt").write_text("John 3:1 a man\nJohn 3:2 a man\n")
    with pytest.raises(SourceError, match="2 entries and none"):
        Verses(str(tmp_path / "same.txt")).load()


def dictionary(folder, entries):
    """Files as dictfmt(1) writes them: the text of all entries, and where each lies, in base 64."""
    digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    number = lambda n: (number(n // 64) if n >= 64 else "") + digits[n % 64]
    text, index = b"", []
    for head, body in entries:
        entry = f"{head}\n   {body}\n".encode()
        index.append(f"{head}\t{number(len(text))}\t{number(len(entry))}")
        text += entry
    (folder / "words.index").write_text("\n".join(index) + "\n")
    (folder / "words.dict.dz").write_bytes(gzip.compress(text))
    return Dictionary(str(folder / "words.dict.dz"))


def test_headwords_are_asked_for_by_their_definition(tmp_path):
    filler = "word " * 130
    entries = [
        ("00databaseinfo", "a text about the dictionary itself, which nobody will ask for"),
        ("cache", "A small fast {memory} that keeps\n   what was used; pronounced Cache, like cash"),
        ("cachet", "a mark of approval, é la mode, that sets a thing apart"),
        ("short", "too few words"),
        ("stack", "what was put on it last is taken first " + filler),
    ]
    found = dictionary(tmp_path, entries).load()
    # "cache" begins "cachet": an answer of one would be found in the other
    assert [q.answers for q in found.questions] == [("cachet",), ("stack",)]
    cache, cachet, stack = found.documents
    assert cache == "cache: A small fast memory that keeps what was used; pronounced Cache, like cash"
    assert cachet.endswith("é la mode, that sets a thing apart") and stack.count(" ") == 121 and stack.endswith("…")
    assert found.questions[0].query.startswith('Which headword of the dictionary is defined as "a mark of approval')
    (tmp_path / "two").mkdir()
    (question,) = dictionary(tmp_path / "two", entries[1:2]).load().questions
    assert "_____, like cash" in question.query and "Cache" not in question.query


def test_dictionaries_that_are_none_are_refused_in_a_line(tmp_path):
    with pytest.raises(SourceError, match="not named NAME"):
        Dictionary(str(tmp_path / "words.txt")).load()
    found = dictionary(tmp_path, [("cache", "a small fast memory that keeps what was used")])
    (tmp_path / "words.index").write_text("cache\tA\tB\ncache\t~\tB\n")
    with pytest.raises(SourceError, match=r"words.index:2: .*offset"):
        found.load()
    (tmp_path / "words.index").write_text("cache\tA\t//\n")
    with pytest.raises(SourceError, match=r"words.index:1: .*do not belong together"):
        found.load()
    (tmp_path / "words.dict.dz").write_bytes(b"no gzip")
    with pytest.raises(SourceError, match="damaged or truncated"):
        found.load()


def test_more_documents_keep_those_of_fewer_and_gold_is_always_among_them():
    loaded = Gaps().load()
    question = loaded.questions[10]
    chosen = lambda n: set(chosen_documents(np.random.default_rng(3), question, n, len(loaded.documents)))
    assert set(question.gold) <= chosen(1) < chosen(5) < chosen(40)
    assert chosen(5) - set(question.gold) < set(question.near)


def test_a_config_names_the_tasks():
    suite = from_dict(Ruler, dict(kind="ruler", only=("ruler_vt",), two_documents=dict(kind="hotpot", path="x.json")))
    assert [task.name for task in suite.members()] == ["ruler_vt"] and from_dict(Ruler, to_dict(suite)) == suite
    with pytest.raises(ConfigError, match="did you mean 'ruler_vt'"):
        Ruler(only=("ruler_v",))
