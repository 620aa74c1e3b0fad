import json

import pytest

from irope_jax.core.config import ConfigError, from_dict, to_dict
from irope_jax.data.config import DataConfig, Ingredient
from irope_jax.data.haystacks import TextHaystack
from irope_jax.data.packing import BestFit, OnePerRow
from irope_jax.data.sources import Corpus, Jsonl
from irope_jax.data.synthetic import Copy, Needle
from irope_jax.data.tokenizer import ByteTokenizer, TokenizerFile


def test_config_round_trips_through_json():
    config = DataConfig(
        seq_len=64,
        mixture=(
            Ingredient(Corpus("train"), 2.0),
            Ingredient(Jsonl("x.jsonl")),
            Ingredient(Needle(TextHaystack()), lengths=(60, 65)),
        ),
        packing=BestFit(8, 16),
        tokenizer=ByteTokenizer(128),
    )
    assert from_dict(DataConfig, json.loads(json.dumps(to_dict(config)))) == config
    assert from_dict(DataConfig, {}) == DataConfig() and DataConfig().packing == OnePerRow()


MISTAKES = [
    ({"seq_len": 0}, "config.seq_len=0: must be at least 1"),
    ({"batch_size": 0}, "config.batch_size=0"),
    ({"seed": -1}, "config.seed=-1"),
    ({"mixture": []}, "config.mixture"),
    ({"mixture": [{"weight": 0.0}]}, "config.mixture.0.weight=0.0"),
    ({"mixture": [{"lengths": [3, 4]}]}, "config.mixture.0.lengths"),
    ({"mixture": [{"source": {"kind": "corpsu"}}]}, "did you mean 'corpus'"),
    ({"seq_len": 100, "packing": {"kind": "best_fit", "document_multiple": 32}}, "config.packing.document_multiple=32"),
    ({"mixture": [{"source": {"kind": "copy"}}]}, "config.tokenizer.num_symbols=0: the task 'copy' needs 64"),
    (
        {
            "mixture": [{"source": {"kind": "copy"}, "lengths": [9, 90]}],
            "tokenizer": {"kind": "bytes", "num_symbols": 64},
        },
        "config.mixture.0.lengths=(9, 90): the task 'copy' as set needs at least 35 tokens",
    ),
    (
        {"mixture": [{"source": {"kind": "copy"}}], "seq_len": 33, "tokenizer": {"kind": "bytes", "num_symbols": 64}},
        "config.seq_len=33: the task 'copy' as set needs at least 35 tokens",
    ),
    (
        {"mixture": [{"source": {"kind": "copy"}, "lengths": [40, 99]}], "seq_len": 64},
        "config.mixture.0.lengths=(40, 99): a row has room for seq_len + 1 = 65 tokens",
    ),
]


@pytest.mark.parametrize("data, words", MISTAKES, ids=[words[:40] for _, words in MISTAKES])
def test_mistakes_are_one_line_with_field_and_fix(data, words):
    with pytest.raises(ConfigError) as error:
        from_dict(DataConfig, data)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_a_config_is_made_without_reading_files():
    DataConfig(mixture=(Ingredient(Jsonl("/nowhere.jsonl")),), tokenizer=TokenizerFile("/nowhere.json"))
    with pytest.raises(ConfigError, match="num_symbols=0"):
        DataConfig(mixture=(Ingredient(Copy()),), tokenizer=TokenizerFile("/nowhere.json"))
