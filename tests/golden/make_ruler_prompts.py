"""Write `ruler_prompts.json`: prompts of lm-evaluation-harness 0.4.13 for RULER's 13 tasks, and what is in them.

    pip download lm_eval==0.4.13 --no-deps && unzip lm_eval-*.whl -d lm_eval_wheel
    PYTHONPATH=lm_eval_wheel:. python tests/golden/make_ruler_prompts.py

The harness's own code runs; only what it would fetch is put in its place: word lists, essays, a tokenizer that counts
words. The prompt is input, delimiter and answer prefix, joined as `ConfigurableTask` joins them without a chat
template. Every case keeps the pieces that chance decided, so that a test can put them into our own templates.
"""

import importlib.metadata
import json
import pathlib
import random
import re
import sys
import types
from collections import Counter

import numpy as np

ESSAY = (
    "Call me Ishmael. Some years ago, never mind how long precisely, I thought I would sail about a little. It is "
    "a way I have of driving off the spleen. There is nothing surprising in this. If they but knew it, almost all "
    "men cherish very nearly the same feelings towards the ocean with me. Right and left, the streets take you "
    "waterward. Look at the crowds of water-gazers there. Were they but a pair of stairs higher, they would be in "
    "the rigging."
)
DOCUMENTS = [f"The {color} house\nIn the {color} house lives a {animal}." for color, animal in (
    ("red", "cat"), ("blue", "dog"), ("green", "owl"), ("white", "hen"))]  # fmt: skip
QUESTION = {"query": "Who lives in the blue house?", "outputs": ["dog", "a dog"], "context": [1], "more_context": [0]}
samples: list[list[int]] = []


def stand_in(name, **members):
    module = types.ModuleType(name)
    module.__dict__.update(members)
    sys.modules[name] = module


class CountsWords:
    def __call__(self, text):
        return types.SimpleNamespace(input_ids=text.split())


def stand_ins():
    version = importlib.metadata.version
    importlib.metadata.version = lambda name: "3.9.1" if name == "nltk" else version(name)
    words = {"nouns": ["boat", "lamp", "hill"], "adjectives": ["calm", "red"], "verbs": ["run"]}
    words |= {"noun": [f"noun{a}{b}" for a in "abcdefgh" for b in "klmnopqr"], "adjective": ["calm"], "verb": ["run"]}
    stand_in("wonderwords", RandomWord=lambda: types.SimpleNamespace(_categories=words))
    cut = lambda text: re.split(r"(?<=[.!?]) ", text)
    stand_in("nltk", sent_tokenize=cut, data=types.SimpleNamespace(find=lambda name: name))
    stand_in("transformers", AutoTokenizer=None)
    stand_in("datasets", Dataset=object)
    stand_in("requests")
    stand_in("tqdm", tqdm=lambda items, **_: items)
    stand_in("packaging")
    stand_in("packaging.version", parse=lambda text: tuple(map(int, text.split("."))))
    own = random.sample

    def noted(population, k):
        found = own(population, k)
        samples.append([int(x) if isinstance(x, (int, np.integer)) else str(x) for x in found])
        return found

    random.sample = noted


def prompt(document, delimiter=" "):
    begin, prefix = document["input"], document["gen_prefix"]
    needs = begin and not (begin[-1].isspace() or prefix[0].isspace())
    return begin + (delimiter if needs else "") + prefix


def needle_cases():
    from lm_eval.tasks.ruler import niah_utils, prepare_niah

    settings = {
        "niah_single_1": ("repeat", {}),
        "niah_single_2": ("essay", {}),
        "niah_single_3": ("essay", dict(type_needle_v="uuids")),
        "niah_multikey_1": ("essay", dict(num_needle_k=4)),
        "niah_multikey_2": ("needle", {}),
        "niah_multikey_3": ("needle", dict(type_needle_k="uuids", type_needle_v="uuids")),
        "niah_multivalue": ("essay", dict(num_needle_v=4)),
        "niah_multiquery": ("essay", dict(num_needle_q=4)),
    }
    for name, (kind, changes) in settings.items():
        haystack = ESSAY.split(" ") if kind == "essay" else prepare_niah.get_haystack(kind)
        plain = dict(type_needle_k="words", type_needle_v="numbers") | changes
        samples.clear()
        (document,) = prepare_niah.generate_samples(
            haystack, max_seq_length=400, template=niah_utils.TEMPLATE, type_haystack=kind, num_samples=1,
            TOKENIZER=CountsWords(), **plain,
        )  # fmt: skip
        made = prompt(document)
        context = made.split("afterwards.\n")[1].split("\nWhat ")[0]
        places, asked = samples[-2], samples[-1]
        hidden = re.findall(r"One of the special magic \w+ for \S+ is: \S+\.", context)
        case = {"kind": plain["type_needle_v"], "answers": document["outputs"], "prompt": made}
        if kind == "essay":
            sentences = re.split(r"(?<=[.!?]) ", ESSAY)
            case |= {"sentences": sentences, "needles": hidden, "depths": sorted(p / 100 for p in places)}
        else:
            lines = context.split("\n")
            # Place p in the lines that were there before is line p + (needles before it).
            at = [place + i for i, place in enumerate(sorted(places))]
            case |= {"lines": [line for i, line in enumerate(lines) if i not in at], "places": sorted(places)}
            case["needles"] = [lines[i] for i in at]
        keys = {re.search(r"is: (\S+)\.", n)[1]: re.search(r"for (\S+) is", n)[1] for n in case["needles"]}
        case["queries"] = list(dict.fromkeys(keys[answer] for answer in case["answers"]))
        assert len(case["queries"]) == len(asked)
        yield name, case


def variable_case():
    from lm_eval.tasks.ruler import vt_utils

    vt_utils.print = lambda *_: None
    make = vt_utils.sys_vartrack_w_noise_random
    example = make(CountsWords(), num_samples=1, max_seq_length=250, incremental=5)[0]
    samples.clear()
    (document,) = make(CountsWords(), num_samples=1, max_seq_length=700, icl_example=example)
    made = prompt(document)
    first, second = made.split("\n\n\n\n")
    head = "hidden in the following text.\n\n"
    text = first.split(head)[1].split("\nQuestion:")[0]
    case = {
        "example": [text, re.search(r"the value (\d+) in", first)[1], first.split("they are:")[1].split()],
        "noises": second.count("The grass"),
        "names": document["outputs"],
        "value": re.search(r"the value (\d+) in", second)[1],
        "places": sorted(samples[-1]),
        "prompt": made,
    }
    return "ruler_vt", case


def list_cases():
    from lm_eval.tasks.ruler import cwe_utils, fwe_utils

    counts = {}
    for length in (4096, 600):
        (document,) = cwe_utils.sys_word_pair_random(1, length, tokenizer=CountsWords())
        words = re.findall(r"\d+\. (\w+)", document["input"].split("\n")[1])
        counts[length] = sorted(set(Counter(words).values()))
    made = {"words": words, "counts": counts, "answers": document["outputs"], "prompt": prompt(document, "\n\n")}
    yield "ruler_cwe", made
    (document,) = fwe_utils.sys_kwext(CountsWords(), 400, num_samples=1)
    coded = document["input"].split("coded words. ")[1].split("\nQuestion")[0].split(" ")
    number = fwe_utils.generate_input_output(400, CountsWords(), vocab_size=8, incremental=400 // 32)[2]
    yield (
        "ruler_fwe",
        {"words": coded, "answers": document["outputs"], "vocabulary": 8, "number": number, "prompt": prompt(document)},
    )


def question_cases():
    from lm_eval.tasks.ruler import qa_utils

    for name in ("ruler_qa_squad", "ruler_qa_hotpot"):
        (document,) = qa_utils.generate_samples(CountsWords(), DOCUMENTS, [QUESTION], 300, num_samples=1)
        made = prompt(document)
        shown = re.findall(r"Document \d+:\n(.*?)(?=\n\n)", made, re.DOTALL)
        yield name, {"documents": shown, "query": QUESTION["query"], "answers": QUESTION["outputs"], "prompt": made}


def main():
    stand_ins()
    random.seed(7)
    np.random.seed(7)
    cases = dict([*needle_cases(), variable_case(), *list_cases(), *question_cases()])
    path = pathlib.Path(__file__).with_name("ruler_prompts.json")
    path.write_text(json.dumps({"version": "lm_eval 0.4.13", "cases": cases}, indent=1) + "\n")


if __name__ == "__main__":
    main()
