"""Answers RULER's prompts by reading them: knows the wording, and nothing that the generator drew."""

import re
from collections import Counter


def read(name: str, prompt: str) -> list[str]:
    """What a perfect reader would say to a prompt of task `name`."""
    if name.startswith("niah"):
        asked = re.findall(r"magic \w+ for (.+?) mentioned in the provided text", prompt)[-1]
        keys = re.split(r", and |, ", asked)
        told = re.findall(r"One of the special magic \w+ for (\S+) is: (\S+)\.", prompt)
        return [value for key in keys for k, value in told if k == key]
    if name == "ruler_vt":
        value = re.findall(r"assigned the value (\d+)", prompt)[-1]
        told = dict(re.findall(r"VAR (\w+) = (?:VAR )?(\w+)", prompt.split("\n\n\n\n")[1]))
        ends = {name: name for name in told}
        for _ in told:
            ends = {name: told.get(end, end) for name, end in ends.items()}
        return [name for name, end in ends.items() if end == value]
    if name == "ruler_cwe":
        counts = Counter(re.findall(r"\d+\. (\S+)", prompt.split("\nQuestion")[0]))
        return [word for word, _ in counts.most_common(10)]
    if name == "ruler_fwe":
        words = prompt.split("coded words. ")[1].split("\nQuestion")[0].split(" ")
        return [word for word, _ in Counter(words).most_common(4)][1:]
    documents = prompt.split("given documents.\n\n")[1].split("\n\nAnswer the question")[0]
    if name == "ruler_qa_squad":
        begin, end = re.search(r'documents: "(.*)"\? Answer:', prompt, re.DOTALL)[1].split("_____")
        return re.findall(re.escape(begin) + r"(\w+)" + re.escape(end), documents)
    year = int(re.search(r"in (\d+)\?", prompt)[1])
    terms = re.findall(r"\n(.+) was president of the United States from (\d+) to (\d+)\.", documents)
    (person,) = [who for who, first, last in terms if int(first) < year < int(last)]
    return re.findall(rf"\n{re.escape(person)} was born in (.+)\.", documents)
