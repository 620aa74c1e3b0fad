import json

import numpy as np
import pytest

from irope_jax.core.config import ConfigError, from_dict, to_dict
from irope_jax.data.tokenizer import MARKERS, ByteTokenizer, TokenizerFile, TokenizerSpec

NASTY = ["", "plain", "héllo — ‘quoted’", "日本語\n\ttabs  two", "<bos><k1>", "\r\n", "🙂\u200d"]


@pytest.fixture(scope="module")
def tokenizer_json(tmp_path_factory):
    tokenizers = pytest.importorskip("tokenizers")
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|begin|>", "<|end|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(["the cat sat on the mat " * 20], trainer)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    bpe.save(str(path))
    return path


@pytest.mark.parametrize("text", NASTY)
def test_bytes_are_the_utf8_bytes_and_come_back(text):
    tokenizer = ByteTokenizer(4)
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32 and ids.tolist() == list(text.encode("utf-8"))
    assert tokenizer.decode(ids) == text


def test_special_ids_are_distinct_and_past_the_text():
    tokenizer = ByteTokenizer(5)
    ids = [tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, *map(tokenizer.marker, MARKERS)]
    ids += tokenizer.symbols(0, 5).tolist()
    assert sorted(ids) == list(range(256, tokenizer.vocab_size))


def test_decode_names_what_is_not_text():
    tokenizer = ByteTokenizer(20)
    ids = [
        tokenizer.bos_id,
        tokenizer.marker("set"),
        tokenizer.symbols(12, 1)[0],
        104,
        0xFF,
        105,
        tokenizer.eos_id,
        9999,
    ]
    assert tokenizer.decode(ids) == "<bos><set><k12>h\ufffdi<eos><?9999>"


def test_symbol_and_marker_mistakes_name_the_field():
    with pytest.raises(ConfigError, match=r"num_symbols=4: set it to at least 9"):
        ByteTokenizer(4).symbols(8, 1)
    with pytest.raises(ConfigError, match="marker='gett': did you mean 'get'"):
        ByteTokenizer().marker("gett")
    with pytest.raises(ConfigError, match="num_symbols=-1"):
        ByteTokenizer(-1)


def test_specs_are_a_union_by_kind():
    for spec in (ByteTokenizer(7), TokenizerFile("x.json", bos="<s>")):
        assert from_dict(TokenizerSpec, to_dict(spec)) == spec


@pytest.mark.parametrize("text", NASTY)
def test_file_round_trip(tokenizer_json, text):
    tokenizer = TokenizerFile(str(tokenizer_json))
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert [x.tolist() for x in tokenizer.encode_batch([text, "the"])] == [
        tokenizer.encode(text).tolist(),
        tokenizer.encode("the").tolist(),
    ]


def test_file_merges_words(tokenizer_json):
    assert len(TokenizerFile(str(tokenizer_json)).encode("the cat sat on the mat")) < 12


def test_text_that_spells_a_special_token_stays_text(tokenizer_json):
    tokenizer = TokenizerFile(str(tokenizer_json), bos="<|begin|>", eos="<|end|>")
    ids = tokenizer.encode("a <|begin|> b<|end|>")
    assert tokenizer.bos_id not in ids and tokenizer.eos_id not in ids
    assert tokenizer.decode([tokenizer.bos_id, *ids]) == "<bos>a <|begin|> b<|end|>"


def test_ids_past_the_vocabulary_of_a_file(tokenizer_json):
    plain = TokenizerFile(str(tokenizer_json), bos="<|begin|>", eos="<|end|>", pad="<|end|>")
    size = plain.text_vocab_size
    assert plain.vocab_size == size and (plain.bos_id, plain.eos_id, plain.pad_id) == (0, 1, 1)
    more = TokenizerFile(str(tokenizer_json), bos="<|begin|>", num_symbols=3)
    assert (more.bos_id, more.eos_id, more.pad_id) == (0, size, size + 1)
    assert more.marker("set") == size + 2
    assert more.symbols(0, 3).tolist() == list(range(size + 10, size + 13)) and more.vocab_size == size + 13
    assert more.decode(more.symbols(2, 1)) == "<k2>"
    with pytest.raises(ConfigError, match=r"tokenizer\.num_symbols=0"):
        plain.marker("set")


def test_a_changed_file_is_noticed(tokenizer_json, tmp_path):
    copy = tmp_path / "t.json"
    copy.write_bytes(tokenizer_json.read_bytes())
    pinned = TokenizerFile(str(copy)).pinned()
    assert pinned.encode("the").size
    data = json.loads(copy.read_text())
    data["model"]["merges"] = data["model"]["merges"][:-1]
    copy.write_text(json.dumps(data))
    with pytest.raises(ConfigError, match="has changed"):
        TokenizerFile(str(copy), sha256=pinned.sha256).encode("the")
    assert TokenizerFile(str(copy)).fingerprint != pinned.fingerprint


def test_file_errors_are_one_line(tokenizer_json, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"did you mean '<\|begin\|>'"):
        _ = TokenizerFile(str(tokenizer_json), bos="<|begin>").bos_id
    with pytest.raises(ConfigError, match="No such file"):
        TokenizerFile(str(tmp_path / "none.json")).encode("x")
    for content in (b"{}", b"not json", b"\xff\x00"):
        (tmp_path / "bad.json").write_bytes(content)
        with pytest.raises(ConfigError, match=r"not a tokenizer\.json") as error:
            TokenizerFile(str(tmp_path / "bad.json")).encode("x")
        assert "\n" not in str(error.value)
    monkeypatch.setitem(__import__("sys").modules, "tokenizers", None)
    with pytest.raises(ConfigError, match=r"irope-jax\[text\]"):
        TokenizerFile(str(tokenizer_json)).encode("x")
