import json
import lzma
import sys
from pathlib import Path

import pytest

from irope_jax.core.config import ConfigError, from_dict, to_dict
from irope_jax.data import sources
from irope_jax.data.reading import SourceError
from irope_jax.data.sources import Corpus, Directory, Jsonl, Parquet, SourceSpec, TextFile, open_source


def test_corpus_splits_share_no_text():
    train, validation, test = (open_source(Corpus(split)) for split in ("train", "validation", "test"))
    assert [len(x) for x in (train, validation, test)] == [5, 1, 1]
    assert validation[0].startswith("Persuasion") and "Call me Ishmael" in test[0]
    for line in ("Sir Walter Elliot, of Kellynch Hall", "Call me Ishmael"):
        assert not any(line in text for text in train)
    assert sum(map(len, train)) == 883027 + 883278 + 433410 + 684767 + 673687


def test_a_damaged_corpus_is_noticed(monkeypatch):
    monkeypatch.setattr(sources, "CORPUS_SHA256", "0" * 64)
    sources._corpus.cache_clear()
    with pytest.raises(SourceError, match="damaged"):
        open_source(Corpus())
    sources._corpus.cache_clear()


def test_text_files_and_separators(tmp_path):
    (tmp_path / "b.txt").write_text("three")
    (tmp_path / "a.txt").write_text("one\n---\ntwo")
    assert open_source(TextFile(f"{tmp_path}/a.txt")) == ["one\n---\ntwo"]
    assert open_source(TextFile(f"{tmp_path}/*.txt", separator="\n---\n")) == ["one", "two", "three"]


def test_jsonl_in_order_with_blank_lines_and_empty_texts_left_out(tmp_path):
    path = tmp_path / "x.jsonl.xz"
    path.write_bytes(lzma.compress(b'{"text": "a", "n": 1}\n\n{"text": ""}\r\n{"text": "\\u00e9\\n"}'))
    assert open_source(Jsonl(str(path))) == ["a", "é\n"]


BAD_LINES = {
    b'{"text": "x"': "not JSON",
    b'{"text": NaN}': "should be text, got float",
    b'["text"]': "expected a JSON object, got list",
    b'{"txet": "x"}': "no field 'text'; did you mean 'txet'",
    b"{}": "the object is empty",
    b'{"text": null}': "should be text, got NoneType",
    b'{"text": "\\ud800"}': "lone surrogate",
    b'{"text": "\xff"}': "not UTF-8",
    b"\x00\x01\x02": "NUL bytes",
    b"[" * 200_000: "JSON",
    b'{"text": ' + b"9" * 10_000 + b"}": "JSON",
}


@pytest.mark.parametrize("line", BAD_LINES, ids=list(BAD_LINES.values()))
def test_bad_jsonl_lines_name_file_and_line_or_are_skipped(tmp_path, line):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"text": "before"}\n' + line + b'\n{"text": "after"}\n')
    with pytest.raises(SourceError) as error:
        open_source(Jsonl(str(path)))
    assert str(error.value).startswith(f"{path}:2: ") and BAD_LINES[line] in str(error.value)
    assert "\n" not in str(error.value) and (error.value.__suppress_context__ or error.value.__context__ is None)
    assert open_source(Jsonl(str(path), damaged="skip")) == ["before", "after"]


def test_missing_and_empty_files(tmp_path):
    (tmp_path / "empty.txt").touch()
    (tmp_path / "empty.jsonl").touch()
    cases = [
        (TextFile(f"{tmp_path}/none.txt"), "no such file"),
        (TextFile(f"{tmp_path}/*.rst"), "no file matches"),
        (TextFile(str(tmp_path)), "use a source of kind 'directory'"),
        (TextFile(f"{tmp_path}/empty.txt"), "holds no text"),
        (Jsonl(f"{tmp_path}/empty.jsonl"), "holds no text"),
        (Directory(f"{tmp_path}/none"), "no such directory"),
        (Directory(str(tmp_path), pattern="*.rst"), "no file matches"),
    ]
    for spec, words in cases:
        with pytest.raises(SourceError, match=words):
            open_source(spec)


def test_parquet(tmp_path):
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    good = str(tmp_path / "good.parquet")
    parquet.write_table(pa.table({"text": ["a", "é"], "n": [1, 2]}), good, row_group_size=1)
    assert open_source(Parquet(good)) == ["a", "é"]
    with pytest.raises(SourceError, match=r"good\.parquet: has no column 'txt'; did you mean 'text'"):
        open_source(Parquet(good, field="txt"))
    with pytest.raises(SourceError, match=r"good\.parquet:1: field 'n' should be text, got int"):
        open_source(Parquet(good, field="n"))
    holes = str(tmp_path / "holes.parquet")
    parquet.write_table(pa.table({"text": ["a", None, "c"]}), holes)
    with pytest.raises(SourceError, match=r"holes\.parquet:2: "):
        open_source(Parquet(holes))
    assert open_source(Parquet(holes, damaged="skip")) == ["a", "c"]
    junk = tmp_path / "junk.parquet"
    for data in (b"", b"PAR1 nothing", Path(good).read_bytes()[:-20]):
        junk.write_bytes(data)
        with pytest.raises(SourceError, match=r"not a parquet file"):
            open_source(Parquet(str(junk)))


def test_parquet_without_the_library(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ConfigError, match=r"irope-jax\[text\]"):
        open_source(Parquet("x.parquet"))


def test_directory_is_sorted_nested_and_reads_compressed_files(tmp_path):
    (tmp_path / "b" / "c").mkdir(parents=True)
    (tmp_path / "b" / "c" / "1.txt").write_text("deep")
    (tmp_path / "b" / "2.txt.xz").write_bytes(lzma.compress(b"packed"))
    (tmp_path / "a.txt").write_text("top")
    (tmp_path / "image.png").write_bytes(b"\x89PNG\x00")
    assert open_source(Directory(str(tmp_path))) == ["top", "packed", "deep"]
    with pytest.raises(SourceError, match=r"image\.png:1: .*NUL|image\.png:1: not UTF-8"):
        open_source(Directory(str(tmp_path), pattern="**/*"))
    assert open_source(Directory(str(tmp_path), pattern="**/*", damaged="skip")) == ["top", "packed", "deep"]


def test_directory_order_is_not_that_of_the_disk(tmp_path):
    names = [f"{i:02d}.txt" for i in range(40)]
    for name in sorted(names, key=lambda name: hash((name, 1))):
        (tmp_path / name).write_text(name)
    assert open_source(Directory(str(tmp_path))) == names


def test_specs_round_trip_and_check_themselves():
    for spec in (Corpus("test"), TextFile("a"), Jsonl("a", "b", "skip"), Parquet("a"), Directory("a")):
        assert from_dict(SourceSpec, json.loads(json.dumps(to_dict(spec)))) == spec
    for bad in (
        lambda: Corpus("tset"),
        lambda: TextFile(""),
        lambda: Jsonl("x", damaged="no"),
        lambda: Directory("a", "/x"),
    ):
        with pytest.raises(ConfigError):
            bad()
