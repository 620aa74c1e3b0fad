"""What recipes share: texts by name, the evaluations that gates read, tokenizers, and how a recipe becomes tiny.

At full size a text is a folder of JSON lines, `data/NAME/*.jsonl.zst`, that whoever runs the recipe puts there.
"""

from pathlib import PurePosixPath

from ml_collections import ConfigDict

MIXED = dict(params="float32", compute="bfloat16")
ROWS, STEPS = 8, 2
HEAD = 16

LLAMA2 = dict(size=32_000, bos=(1, "<s>"), eos=(2, "</s>"))
LLAMA3 = dict(size=128_256, bos=(128_000, "<|begin_of_text|>"), eos=(128_001, "<|end_of_text|>"))
QWEN25 = dict(size=152_064, bos=(151_643, "<|endoftext|>"), eos=(151_643, "<|endoftext|>"))
"""How many ids, and which begin and end a document: number and text."""


def text(name: str) -> dict:
    return dict(kind="jsonl", path=f"data/{name}/*.jsonl.zst")


def parts(**weights: float) -> tuple:
    """A mixture: percent by name of the text."""
    return tuple(dict(source=text(name), weight=weight) for name, weight in weights.items())


def evaluations(short: int, lengths: tuple) -> tuple:
    """`short`: loss at the length of before. `passkey`: is a number found that was told anywhere in the text?"""
    held_out = text("held_out")
    return (
        dict(kind="perplexity", name="short", source=held_out, lengths=(short,), tokens=1_048_576),
        dict(kind="passkey", name="passkey", source=held_out, lengths=lengths),
    )


def sized(config: ConfigDict, size: str, *, ids: dict, divide: int, source: bool = False) -> ConfigDict:
    """The recipe at a size.

    Args:
      config: the recipe at full size, without a tokenizer.
      size: `full` resolves on any machine, its tokenizer is ids alone; `imported` is the same with the file that
        `irope import` put beside the weights; `tiny` trains here.
      ids: of the tokenizer.
      divide: tiny: lengths, windows and chunks are this much shorter.
      source: tiny: a stage comes first that trains the model as it was before any stage changed it, in place of the
        weights that `init_from` names.
    """
    (bos, begin), (eos, end) = ids["bos"], ids["eos"]
    if size == "full":
        config.data.tokenizer = dict(kind="ids", size=ids["size"], bos=bos, eos=eos, pad=eos)
        return config
    if size == "imported":
        file = str(PurePosixPath(config.train.init_from) / "tokenizer.json")
        config.data.tokenizer = dict(kind="file", path=file, bos=begin, eos=end, pad=end)
        return config
    if size != "tiny":
        raise ValueError(f"unknown size {size!r}; choose one of: full, imported, tiny")
    tiny = _shrunk(config.to_dict(), divide)
    model, stages = config.model, config.stages
    kv_heads = 2 if model.num_kv_heads == model.num_heads else 1
    tiny |= dict(
        name=f"{config.name}_tiny",
        description=f"{config.description}; two steps a stage, for a look at the stages",
        mesh=dict(data=-1),
        stages=(dict(name="source", steps=STEPS),) * source + tuple(_stage(stage, divide) for stage in stages),
    )
    tiny["model"] |= dict(vocab_size=288, d_model=32, num_heads=2, num_kv_heads=kv_heads, head_dim=HEAD)
    tiny["model"] |= dict(num_layers=max(2, len(model.pattern)), remat="none", precision=dict(compute="float32"))
    tiny["data"] |= dict(batch_size=ROWS, tokenizer=dict(kind="bytes", num_symbols=16))
    tiny["train"] |= dict(steps=STEPS, log_every=1, accumulate=1, init_from=None)
    return ConfigDict(tiny)


def _stage(stage: dict, divide: int) -> dict:
    """Two steps of eight rows; what it changes, but not the devices."""
    left = {k: v for k, v in stage.items() if k not in ("tokens", "length", "batch_tokens", "change", "gate")}
    change = {k: v for k, v in stage.get("change", {}).items() if not k.startswith("mesh.") and k != "train.accumulate"}
    tiny = left | dict(steps=STEPS, change=_shrunk(change, divide))
    if "length" in stage:
        length = stage["length"] // divide
        tiny |= dict(length=length, batch_tokens=ROWS * length)
    if "gate" in stage:
        tiny["gate"] = stage["gate"] | dict(every=STEPS, least_steps=0, at_limit="go_on")
    return tiny


LENGTHS = ("seq_len", "original_length", "train_length", "floor_scale", "document_multiple", "size")


def _shrunk(values: dict, divide: int) -> dict:
    """The values with shorter lengths, the shipped novels as text, and rates for a model that begins from nothing."""
    return {key: _smaller(key.split(".")[-1], value, divide) for key, value in values.items() if key != "stages"}


def _smaller(name: str, value, divide: int):
    if name in LENGTHS:
        return max(1, value // divide)
    if name == "lengths":
        return tuple(length // divide for length in value)
    if name == "source":
        return dict(kind="corpus", split="validation" if "held_out" in value["path"] else "train")
    if name == "ffn":
        return dict(kind="swiglu", hidden_dim=32)
    if name == "evals":
        return tuple(_evaluation(one, divide) for one in value)
    if name == "learning_rate":
        return 100 * value
    if name in ("warmup", "decay"):
        return min(1, value)
    if name in ("long_factor", "short_factor"):
        return tuple(value)[:: max(1, 2 * len(value) // HEAD)]
    if isinstance(value, dict):
        return _shrunk(value, divide)
    if isinstance(value, (tuple, list)) and value and isinstance(value[0], dict):
        return tuple(_shrunk(entry, divide) for entry in value)
    return value


def _evaluation(one: dict, divide: int) -> dict:
    """A tiny model knows no words: what it is asked for are symbols."""
    lengths = tuple(length // divide for length in one["lengths"])
    if one["kind"] == "perplexity":
        return dict(kind="perplexity", name=one["name"], lengths=lengths, tokens=ROWS * lengths[0])
    task = dict(kind="needle", num_facts=(1, 1), num_queries=(1, 1), num_keys=8, num_values=8)
    return dict(kind="retrieval", name=one["name"], task=task, lengths=lengths, queries=8, facts=1, depth_bins=1)
