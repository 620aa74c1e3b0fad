"""Token shards: made from every kind of file, interrupted, damaged, moved, and read piece by piece."""

import gzip
import json
import random
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from irope_jax import cli, prepare
from irope_jax.core.config import ConfigError
from irope_jax.data import shards as shards_module
from irope_jax.data.config import DataConfig, Ingredient
from irope_jax.data.documents import tokenized
from irope_jax.data.haystacks import TextHaystack
from irope_jax.data.packing import BestFit
from irope_jax.data.pipeline import make_iterator
from irope_jax.data.reading import SourceError
from irope_jax.data.shards import ShardDirectory, read_manifest
from irope_jax.data.sources import Jsonl, Shards, open_source, texts_of
from irope_jax.data.synthetic import Needle
from irope_jax.data.tokenizer import ByteTokenizer, TokenizerFile

TOKENIZER = ByteTokenizer()
SHARD_TOKENS = 1000


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """A directory with 60 documents in three files, and the documents."""
    root, rng = tmp_path_factory.mktemp("texts"), random.Random(0)
    documents = [f"{i:03d} " + "é" * rng.randint(0, 120) for i in range(60)]
    for name, part in ("a.jsonl", documents[:30]), ("b.jsonl.gz", documents[30:]):
        data = "".join(json.dumps({"text": text}) + "\n" for text in part).encode()
        (root / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    return root, documents


@pytest.fixture(scope="module")
def made(texts, tmp_path_factory):
    """Shards of them; not to be changed."""
    out = str(tmp_path_factory.mktemp("made") / "shards")
    make(texts[0], out)
    return out


@pytest.fixture
def copy(made, tmp_path):
    """Shards of them that may be changed."""
    shutil.copytree(made, tmp_path / "copy")
    return tmp_path / "copy"


def make(source, out, **changes):
    sources = prepare.sources_named([str(source)], field="text", separator="", damaged=changes.pop("damaged", "error"))
    changes = {"shard_tokens": SHARD_TOKENS, "quiet": True} | changes
    return prepare.prepare(sources, changes.pop("tokenizer", TOKENIZER), str(out), **changes)


def documents_of(out, **options):
    tokenized.cache_clear()
    store = tokenized(Shards(str(out), **options), TOKENIZER)
    return [TOKENIZER.decode(store[d][1:-1]) for d in range(len(store))]


def files_of(out):
    return {str(p.relative_to(out)): p.read_bytes() for p in Path(out).rglob("*") if p.is_file()}


def test_shards_hold_the_documents_in_order(texts, made):
    root, documents = texts
    assert documents_of(made) == documents
    manifest = read_manifest(made)
    assert (manifest["documents"], manifest["bad_records"]) == (60, 0) and manifest["tokenizer"] == "bytes:0"
    assert len(manifest["shards"]) > 5
    assert all(SHARD_TOKENS <= shard.tokens < SHARD_TOKENS + 300 for shard in manifest["shards"][:-1])
    assert [Path(file["path"]).name for file in manifest["files"]] == ["a.jsonl", "b.jsonl.gz"]
    assert manifest["files"][0]["bytes"] == (root / "a.jsonl").stat().st_size
    (both,) = Path(made).parent.glob("*")
    assert both.name == "shards"


def test_the_same_again_byte_for_byte_and_other_places_alike(texts, made, tmp_path):
    make(texts[0], tmp_path / "again")
    assert files_of(tmp_path / "again") == files_of(made)
    make(texts[0], "memory://bucket/shards")  # what is no directory: the same code as gs:// and s3://
    assert documents_of("memory://bucket/shards/") == texts[1]
    for url in "gs://a-bucket/x", "s3://a-bucket/x":
        assert ShardDirectory(url).path == url
    with pytest.raises(SourceError, match="ftp://x: cannot open"):
        ShardDirectory("ftp://x")


@pytest.mark.parametrize("stop", [0, 1, 4, 6])
def test_an_interrupted_run_goes_on_and_keeps_what_is_whole(texts, made, tmp_path, monkeypatch, stop):
    out, written = tmp_path / "out", []
    whole = ShardDirectory.write_shard

    def interrupted(self, record, starts, tokens):
        if len(written) == stop:
            (out / record.name / "tokens" / "c").mkdir(parents=True)
            (out / record.name / "tokens" / "c" / "0").write_bytes(b"half of it")
            raise KeyboardInterrupt
        written.append(record.name)
        whole(self, record, starts, tokens)

    monkeypatch.setattr(ShardDirectory, "write_shard", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make(texts[0], out)
    with pytest.raises(SourceError, match=r"manifest\.json: no such file; make the shards with `irope prepare`"):
        documents_of(out)
    stop = -1
    make(texts[0], out)
    assert len(written) == len(set(written)) == len(read_manifest(str(out))["shards"])
    assert files_of(out) == files_of(made)
    make(texts[0], out)
    assert len(written) == len(set(written))


def test_a_damaged_shard_is_made_anew_by_a_restart(texts, made, copy):
    (copy / "manifest.json").unlink()
    flip(copy / "shard-00002/tokens/c/0")
    (copy / "shard-00004/starts/c/0").unlink()
    make(texts[0], copy)
    assert files_of(copy) == files_of(made)


def test_other_sources_or_tokenizers_are_refused(texts, copy, tmp_path):
    with pytest.raises(ConfigError, match=r"shard_tokens: 1000 -> 999.*choose another --out"):
        make(texts[0], copy, shard_tokens=999)
    shutil.copytree(texts[0], tmp_path / "grown")
    with open(tmp_path / "grown" / "a.jsonl", "a") as file:
        file.write('{"text": "one more"}\n')
    with pytest.raises(ConfigError, match=r"files\.0\.path"):
        make(tmp_path / "grown", copy)
    plan = json.loads((copy / "plan.json").read_text())
    (copy / "plan.json").write_text(json.dumps(plan | {"tokenizer": "bytes:x"}))
    with pytest.raises(ConfigError, match="tokenizer: 'bytes:x' -> 'bytes:0'"):
        make(texts[0], copy)


def flip(path, place=20):
    data = bytearray(path.read_bytes())
    data[place] ^= 4
    path.write_bytes(data)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-30])


DAMAGE = {
    "truncated": (truncate, "tokens/c/0"),
    "gone": (Path.unlink, "tokens/c/0"),
    "flipped bit": (flip, "tokens/c/0"),
    "no starts": (Path.unlink, "starts/c/0"),
    "flipped start": (lambda path: flip(path, 3), "starts/c/0"),
    "no metadata": (Path.unlink, "tokens/zarr.json"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_shard_that_cannot_be_read_is_named_or_left_out(texts, copy, damage, caplog):
    work, part = DAMAGE[damage]
    work(copy / "shard-00003" / part)
    with pytest.raises(SourceError, match=r"copy/shard-00003: unreadable shard \(") as error:
        documents_of(copy)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500
    lost = read_manifest(str(copy))["shards"][3].documents
    left = documents_of(copy, damaged="skip")
    before = sum(shard.documents for shard in read_manifest(str(copy))["shards"][:3])
    assert left == texts[1][:before] + texts[1][before + lost :]
    assert f"left out 1 shards, {lost} documents; the first: {copy}/shard-00003" in caplog.text


def test_damage_past_the_first_piece_is_found_when_read_and_by_the_full_check(texts, made, tmp_path, monkeypatch):
    monkeypatch.setattr(shards_module, "PIECE", 64)
    make(texts[0], tmp_path / "out")
    path = tmp_path / "out" / "shard-00001" / "tokens" / "c" / "0"
    flip(path, len(path.read_bytes()) // 2)
    tokenized.cache_clear()
    store = tokenized(Shards(str(tmp_path / "out")), TOKENIZER)  # the quick check does not see it
    with pytest.raises(SourceError, match=r"shard-00001: unreadable shard .*verify 'full' and damaged 'skip'"):
        store.flat[0 : len(store.flat)]
    stream = make_iterator(DataConfig(seq_len=64, batch_size=4, mixture=(Ingredient(Shards(str(tmp_path / "out"))),)))
    with pytest.raises(SourceError, match="shard-00001: unreadable shard"):  # through the prefetch thread
        for _ in range(200):
            next(stream)
    stream.close()
    for check in lambda: documents_of(tmp_path / "out", verify="full"), lambda: cli_verify(texts[0], tmp_path / "out"):
        with pytest.raises(SourceError, match="shard-00001: unreadable shard"):
            check()
    assert len(documents_of(tmp_path / "out", verify="full", damaged="skip")) < 60
    # an array that is whole but another: only the checksum tells
    shutil.rmtree(tmp_path / "out" / "shard-00001" / "tokens")
    record = read_manifest(made)["shards"][1]
    directory = ShardDirectory(str(tmp_path / "out"))
    _, starts = ShardDirectory(made).open_shard(record)
    directory.write_shard(record, starts, np.full(record.tokens, 7, np.uint16))
    documents_of(tmp_path / "out")
    with pytest.raises(SourceError, match=r"shard-00001: damaged shard .*checksum"):
        documents_of(tmp_path / "out", verify="full")


def cli_verify(root, out):
    for shard in read_manifest(str(out))["shards"]:
        ShardDirectory(str(out)).verify_shard(shard)


def test_zeros_are_written_too(tmp_path):
    """Ids of 0 are what tensorstore fills holes with; a missing piece must not look like them."""
    (tmp_path / "z.txt").write_bytes(b"z")
    directory = ShardDirectory(str(tmp_path / "out"))
    record = shards_module.ShardRecord("shard-00000", 1, 50, "", 0, 0, (1, 0))
    directory.write_shard(record, np.array([0, 50]), np.zeros(50, np.uint16))
    tokens, _ = directory.open_shard(record)
    assert (tokens.read().result() == 0).all()


def test_training_streams_from_shards_as_from_text(texts, made, tmp_path):
    documents = texts[1]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in documents)
    (tmp_path / "all.jsonl").write_text(lines)
    tokenized.cache_clear()
    for packing in DataConfig().packing, BestFit(open_rows=4):
        streams = [
            make_iterator(DataConfig(seq_len=64, batch_size=4, mixture=(Ingredient(source),), packing=packing))
            for source in (Jsonl(f"{tmp_path}/all.jsonl"), Shards(made))
        ]
        for _ in range(40):
            text, shard = (next(stream) for stream in streams)
            np.testing.assert_array_equal(text.tokens, shard.tokens)
            np.testing.assert_array_equal(text.weights, shard.weights)
        state = streams[1].get_state()
        for stream in streams:
            stream.close()
    shutil.copytree(made, tmp_path / "moved")
    moved = DataConfig(
        seq_len=64, batch_size=8, mixture=(Ingredient(Shards(f"{tmp_path}/moved", verify="full")),), packing=packing
    )
    iterator = make_iterator(moved)
    iterator.set_state(state)
    next(iterator)
    iterator.close()


def test_reading_a_document_reads_little(made, monkeypatch):
    read = Counter()
    whole = shards_module.start_reading
    monkeypatch.setattr(
        shards_module, "start_reading", lambda tokens, where: read.update(n=tokens.shape[0]) or whole(tokens, where)
    )
    tokenized.cache_clear()
    store = tokenized(Shards(made), TOKENIZER)
    assert read["n"] == 0
    assert len(store[17]) == read["n"] == store.targets[17] + 1
    np.testing.assert_array_equal(store.flat[100:5000], np.concatenate([store[d] for d in range(60)])[100:5000])
    filler = TextHaystack(Shards(made)).fill(np.random.default_rng(0), 200, TOKENIZER)
    assert filler.shape == (200,) and filler.max() < 256
    Needle(TextHaystack(Shards(made)))


def test_symbols_do_not_matter_and_another_tokenizer_does(made, tmp_path):
    tokenized.cache_clear()
    assert len(tokenized(Shards(made), ByteTokenizer(128))) == 60
    (tmp_path / "t.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"tokenizer='file': .*made with bytes:0, this is file:"):
        tokenized(Shards(made), TokenizerFile(str(tmp_path / "t.json")))
    with pytest.raises(SourceError, match="holds tokens, not text"):
        open_source(Shards(made))


BAD = [b'{"text": "good 1"}', b"not json", b'{"text": ""}', b'{"text": "\xff"}', b'{"text": "good 2"}', b'{"txt": 1}']


def test_bad_records_are_named_or_left_out_and_counted(tmp_path):
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    source = tmp_path / "source"
    source.mkdir()
    (source / "a.jsonl").write_bytes(b"\n".join(BAD))
    with pytest.raises(SourceError, match=r"a\.jsonl:2: not JSON"):
        make(source, tmp_path / "out")
    (source / "b.jsonl.gz").write_bytes(
        gzip.compress(b'{"text": "good 3"}\n' + bytes(random.Random(0).randbytes(9000)))[:-99]
    )
    (source / "c.parquet").write_bytes(b"no parquet")
    table = pa.table({"text": [f"row {i} {random.Random(i).randbytes(40).hex()}" for i in range(30)]})
    parquet.write_table(table, source / "d.parquet", row_group_size=10, compression="none", use_dictionary=False)
    data = bytearray((source / "d.parquet").read_bytes())
    place = data.index(b"row 15 ")
    data[place - 4 : place] = b"\xff\xff\xff\x7f"  # the length of a text: its row group cannot be read
    (source / "d.parquet").write_bytes(data)
    (source / "e.txt").write_bytes(b"\xff\xfe bad")
    (source / "f.md").write_text("good 4")
    (source / "ignored.png").write_bytes(b"\x89PNG")
    manifest = make(source, tmp_path / "skipped", damaged="skip", shard_tokens=60)
    kept = documents_of(tmp_path / "skipped")
    rows = [f"row {i}" for i in range(30) if not 10 <= i < 20]
    assert [text if text.startswith("good") else text[:6].strip() for text in kept] == (
        ["good 1", "good 2", "good 3", *rows, "good 4"]
    )
    assert manifest["empty_records"] == 1
    junk = Jsonl(f"{source}/b.jsonl.gz").records(source / "b.jsonl.gz")
    lost = [record for record in junk if isinstance(record, SourceError)]
    assert sum(record.ends_file for record in lost) == 1
    assert manifest["bad_records"] == 3 + len(lost) + 1 + 10 + 1
    assert sorted(set(texts_of(Jsonl(f"{source}/*.jsonl*", damaged="skip")))) == ["", "good 1", "good 2", "good 3"]


def test_a_restart_counts_bad_records_once(tmp_path, monkeypatch):
    lines = [b'{"text": "%d"}' % i if i % 3 else b"bad" for i in range(100)] + [b"bad"] * 5
    (tmp_path / "x.jsonl").write_bytes(b"\n".join(lines))
    for stop in (3, 9, None):
        whole, written = ShardDirectory.write_shard, []

        def interrupted(self, record, *arrays, whole=whole, written=written, stop=stop):
            if len(written) == stop:
                raise KeyboardInterrupt
            written.append(whole(self, record, *arrays))

        with monkeypatch.context() as patch:
            patch.setattr(ShardDirectory, "write_shard", interrupted)
            try:
                manifest = make(tmp_path / "x.jsonl", tmp_path / "out", damaged="skip", shard_tokens=20)
            except KeyboardInterrupt:
                continue
    assert (manifest["documents"], manifest["bad_records"]) == (66, 39)
    assert documents_of(tmp_path / "out") == [str(i) for i in range(100) if i % 3]


def irope(capsys, *arguments):
    code = cli.main(["prepare", *map(str, arguments)])
    return code, *capsys.readouterr()


def test_the_verb(texts, made, tmp_path, capsys):
    root, out = texts[0], tmp_path / "out"
    code, said, _ = irope(
        capsys, root, "--tokenizer=bytes", f"--out={out}", f"--shard-tokens={SHARD_TOKENS}", "--verify"
    )
    assert code == 0 and "60 documents" in said and f"'path': '{out}'" in said
    assert files_of(out) == files_of(made)
    config = Path(__file__).parent.parent / "configs" / "debug.py"
    mixture = f"({{'source': {{'kind': 'jsonl', 'path': '{root}/a.jsonl'}}}},)"
    take = (f"--config={config}", f"--config.data.mixture={mixture}")
    code, said, _ = irope(capsys, *take, f"--out={tmp_path / 'of_config'}", "--on-bad-record=skip")
    assert code == 0 and "30 documents" in said
    manifest = read_manifest(str(tmp_path / "of_config"))
    assert manifest["files"][0]["damaged"] == "skip" and manifest["tokenizer"] == "bytes:0"
    (tmp_path / "empty").mkdir()
    (tmp_path / "e.txt").touch()
    for arguments, words in [
        ((root,), "--tokenizer: give a tokenizer.json"),
        (("--tokenizer=bytes",), "SRC: name files"),
        ((root, "--tokenizer=bytes", "--config.seed=1"), "no --config=FILE"),
        ((root, "--tokenizer=bytes", *take), "--tokenizer='bytes': the config has one"),
        ((*take, "--ingredient=7"), "--ingredient=7"),
        ((tmp_path / "empty", "--tokenizer=bytes"), "holds no file that ends in"),
        ((tmp_path / "x.png", "--tokenizer=bytes"), "x.png: cannot tell what it holds"),
        ((tmp_path / "e.txt", "--tokenizer=bytes"), "hold no text"),
        ((tmp_path / "none.txt", "--tokenizer=bytes"), "none.txt: no such file"),
        ((root, "--tokenizer=bytes", "--shard-tokens=0"), "--shard-tokens=0"),
    ]:
        code, _, err = irope(capsys, *arguments, f"--out={tmp_path / 'wrong' / str(len(words))}")
        assert code == 2 and words in err and err.count("\n") == 1, (arguments, err)


def test_a_full_disk_is_one_clear_error(texts):
    with pytest.raises(SourceError, match=r"/dev/full/x/plan\.json: cannot be written"):
        make(texts[0], "/dev/full/x")
