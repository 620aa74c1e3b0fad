import bz2
import gzip
import lzma

import pytest

from irope_jax.data.reading import SourceError, read_lines, read_text

TEXT = "first\nsecond é\r\n\nfourth without end"
COMPRESS = {"": bytes, ".xz": lzma.compress, ".gz": gzip.compress, ".bz2": bz2.compress}


def zstd(data):
    return pytest.importorskip("zstandard").ZstdCompressor().compress(data)


def write(path, data, suffix):
    path = path / f"file.txt{suffix}"
    path.write_bytes((zstd if suffix == ".zst" else COMPRESS[suffix])(data))
    return path


@pytest.mark.parametrize("suffix", [*COMPRESS, ".zst"])
def test_lines_and_text_of_every_compression(tmp_path, suffix):
    path = write(tmp_path, TEXT.encode(), suffix)
    assert list(read_lines(path)) == [(1, "first"), (2, "second é"), (3, ""), (4, "fourth without end")]
    assert read_text(path) == TEXT


def test_several_zstd_frames_are_all_read(tmp_path):
    path = tmp_path / "two.zst"
    path.write_bytes(zstd(b"one\n") + zstd(b"two\n"))
    assert [line for _, line in read_lines(path)] == ["one", "two"]


@pytest.mark.parametrize("text", ["", "\n", "a", "a\n", "a\n\nb", "\n\n", "x" * 3_000_000 + "\n" + "y" * 1_100_000])
def test_lines_are_those_between_newlines(tmp_path, text):
    path = write(tmp_path, text.encode(), "")
    expected = text.split("\n")
    expected = expected[:-1] if expected[-1] == "" else expected
    assert [line for _, line in read_lines(path)] == expected


def test_byte_order_mark_is_dropped_only_at_the_start(tmp_path):
    path = write(tmp_path, b"\xef\xbb\xbfa\n\xef\xbb\xbfb", "")
    assert [line for _, line in read_lines(path)] == ["a", "\ufeffb"]


@pytest.mark.parametrize("suffix", [".xz", ".gz", ".bz2", ".zst"])
@pytest.mark.parametrize("damage", ["truncated", "junk"])
def test_broken_compression_is_one_clear_error(tmp_path, suffix, damage):
    import random

    data = bytes(random.Random(0).choices(range(97, 123), k=50_000))
    path = write(tmp_path, data, suffix)
    path.write_bytes(path.read_bytes()[:-2000] if damage == "truncated" else b"junk that is not compressed" * 10)
    for read in (read_text, lambda p: list(read_lines(p))):
        with pytest.raises(SourceError, match=rf"file\.txt{suffix}:1: damaged or truncated"):
            read(path)


@pytest.mark.parametrize("bad, word", [(b"\xff", "not UTF-8 .byte 0xff"), (b"a\0b", "NUL")])
def test_not_text_names_the_line(tmp_path, bad, word):
    path = write(tmp_path, b"fine\nfine\nx" + bad + b"y\nfine\n", "")
    for read in (read_text, lambda p: list(read_lines(p))):
        with pytest.raises(SourceError, match=rf"file\.txt:3: .*{word}"):
            read(path)
    assert [n for n, _ in read_lines(path, skip_damaged=True)] == [1, 2, 4]


def test_errors_keep_their_place_inside_a_config():
    error = SourceError("a.jsonl", 7, "not JSON")
    assert str(error) == "a.jsonl:7: not JSON" and str(error.within("config.data")) == str(error)
