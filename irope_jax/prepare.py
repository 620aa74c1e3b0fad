"""`irope prepare`: text to token shards, once, so that training reads tokens where it needs them.

What a shard is, and reading it, is `data/shards.py`. Here: which files, in which order, going on after an interruption,
and what the verb prints.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from irope_jax.core.config import ConfigError, differences, nearest, to_dict
from irope_jax.core.progress import ProgressBar
from irope_jax.data.reading import SourceError
from irope_jax.data.shards import (
    MANIFEST,
    PLAN,
    VERSION,
    ShardDirectory,
    ShardRecord,
    checksum,
    read_manifest,
    text_fingerprint,
    token_documents,
    token_type,
)
from irope_jax.data.sources import Jsonl, Parquet, Shards, TextFile, TextSource
from irope_jax.data.tokenizer import ByteTokenizer, TokenIds, TokenizerFile, TokenizerSpec
from irope_jax.experiment import load_config, resolve

_COMPRESSED = (".xz", ".gz", ".bz2", ".zst")
_KINDS = {
    ".txt": TextFile,
    ".text": TextFile,
    ".md": TextFile,
    ".jsonl": Jsonl,
    ".ndjson": Jsonl,
    ".json": Jsonl,
    ".parquet": Parquet,
}

_BATCH_CHARACTERS = 1 << 22
"""Text that is tokenized together, in parallel where the library can."""


@dataclass(frozen=True)
class _File:
    source: TextSource
    path: Path
    size: int


@dataclass(frozen=True)
class _Tokens:
    """A document on its way into a shard; the last of all has no tokens.

    Attributes:
      tokens: bos, text, eos.
      next: (file, records of it that are done) after it.
      bad, empty: records left out between the document before and this one.
    """

    tokens: np.ndarray | None
    next: tuple[int, int]
    bad: int
    empty: int


def prepare(
    sources: Sequence[TextSource], tokenizer: TokenizerSpec, out: str, *, shard_tokens: int, quiet: bool = False
) -> dict[str, Any]:
    """Make the shards of some sources, or go on making them; the manifest.

    A shard is closed by the document that brings it to `shard_tokens`. What is in which shard depends on nothing but
    sources, tokenizer and that number. Shards that an interrupted run left whole are read back, compared with their
    checksums and kept.

    Args:
      sources: in order; `damaged` of each says what becomes of bad records.
      tokenizer: text to ids.
      out: directory, `gs://…` or `s3://…`.
      shard_tokens: tokens after which a shard is full.
      quiet: no progress.

    Raises:
      SourceError: a source cannot be read, a record is bad and the policy is `error`, or `out` cannot be written.
      ConfigError: `out` holds shards of other sources, another tokenizer or other sizes.
    """
    if shard_tokens < 1:
        raise ConfigError("--shard-tokens", shard_tokens, "must be at least 1")
    if isinstance(tokenizer, TokenIds):
        raise ConfigError("tokenizer", tokenizer.kind, "is no tokenizer of text; give --tokenizer=tokenizer.json")
    files = [_File(source, path, os.stat(path).st_size) for source in sources for path in source.files()]
    directory = ShardDirectory(out)
    plan = {
        "version": VERSION,
        "tokenizer": text_fingerprint(tokenizer),
        "dtype": token_type(tokenizer).name,
        "shard_tokens": shard_tokens,
        "files": [to_dict(file.source) | {"path": str(file.path), "bytes": file.size} for file in files],
    }
    begun = directory.read_json(PLAN)
    if begun is None:
        directory.write_json(PLAN, plan)
    elif changed := differences(begun, plan):
        fix = f"holds shards of something else ({changed[0]}); choose another --out, or remove it"
        raise ConfigError("--out", out, fix)
    if directory.read_json(MANIFEST) is not None:
        return read_manifest(out)
    shards, left_out = _write_shards(directory, files, tokenizer, shard_tokens, quiet)
    totals = {
        "documents": sum(shard.documents for shard in shards),
        "tokens": sum(shard.tokens for shard in shards),
        "bad_records": sum(shard.bad_records for shard in shards) + left_out.bad,
        "empty_records": sum(shard.empty_records for shard in shards) + left_out.empty,
    }
    directory.write_json(MANIFEST, plan | totals | {"shards": [to_dict(shard) for shard in shards]})
    return read_manifest(out)


def _write_shards(
    directory: ShardDirectory, files: Sequence[_File], tokenizer: TokenizerSpec, shard_tokens: int, quiet: bool
) -> tuple[list[ShardRecord], _Tokens]:
    """All shards in order, and what comes after the last document."""
    shards: list[ShardRecord] = []
    ends = np.cumsum([0, *(file.size for file in files)])
    tokens = 0
    with ProgressBar("prepare, MB", max(1, int(ends[-1]) // 10**6), quiet=quiet) as bar:

        def show(place: int, passed: int = 0) -> None:
            # text of a compressed file is longer than the file: then its end comes later than it seems
            done = int(min(ends[place] + passed, ends[min(place + 1, len(files))])) // 10**6
            bar.advance(max(0, done - bar.done), shards=str(len(shards)), tokens=f"{tokens:,}")

        coming = None
        while True:
            name = f"shard-{len(shards):05d}"
            begin = shards[-1].next if shards else (0, 0)
            record = _whole(directory, name)
            if record is None:
                coming = coming or _documents(files, begin, tokenizer, show)
                record = _write_shard(directory, name, coming, shard_tokens)
            else:
                coming = None  # the documents of this one need not be read
            if isinstance(record, _Tokens) and not shards:
                raise SourceError(directory.path, None, "the sources hold no text; every document is empty or bad")
            if isinstance(record, _Tokens):
                show(len(files))
                return shards, record
            shards.append(record)
            tokens += record.tokens
            show(record.next[0])


def _whole(directory: ShardDirectory, name: str) -> ShardRecord | None:
    """The record of a shard that an earlier run finished and that is as it was; `None` to make it anew."""
    try:
        record = directory.shard(name)
        if record is not None:
            directory.verify_shard(record)
    except SourceError:
        return None
    return record


def _write_shard(
    directory: ShardDirectory, name: str, coming: Iterator[_Tokens], shard_tokens: int
) -> ShardRecord | _Tokens:
    """The next shard; or, where no document is left, the end."""
    parts: list[np.ndarray] = []
    size = bad = empty = 0
    for document in coming:
        if document.tokens is None:
            if not parts:
                return document
            bad, empty, place = bad + document.bad, empty + document.empty, document.next
            break
        parts.append(document.tokens)
        size, bad, empty, place = size + len(parts[-1]), bad + document.bad, empty + document.empty, document.next
        if size >= shard_tokens:
            break
    starts, tokens = np.cumsum([0, *map(len, parts)], dtype=np.int64), np.concatenate(parts)
    record = ShardRecord(name, len(parts), size, checksum(starts, tokens), bad, empty, place)
    directory.write_shard(record, starts, tokens)
    return record


def _documents(files: Sequence[_File], begin: tuple[int, int], tokenizer: TokenizerSpec, show) -> Iterator[_Tokens]:
    """All documents from a place on, and one without tokens at the end, however often that is asked for."""
    waiting: list[tuple[str, tuple[int, int], int, int]] = []
    characters = bad = empty = 0

    def encoded() -> Iterator[_Tokens]:
        for tokens, (_, *rest) in zip(token_documents([text for text, *_ in waiting], tokenizer), waiting):
            yield _Tokens(tokens, *rest)

    for place in range(begin[0], len(files)):
        file, done, passed = files[place], 0, 0
        for record in file.source.records(file.path):
            done += 1
            if place == begin[0] and done <= begin[1]:
                continue
            if isinstance(record, SourceError):
                if file.source.damaged == "error":
                    raise record from None
                bad += record.lost
            elif not record:
                empty += 1
            else:
                waiting.append((record, (place, done), bad, empty))
                characters, bad, empty = characters + len(record), 0, 0
            if characters >= _BATCH_CHARACTERS:
                yield from encoded()
                waiting.clear()
                passed, characters = passed + characters, 0
                show(place, passed)
    yield from encoded()
    while True:
        yield _Tokens(None, (len(files), 0), bad, empty)
        bad = empty = 0


def sources_named(names: Sequence[str], *, field: str, separator: str, damaged: str) -> list[TextSource]:
    """Sources for files, glob patterns and directories; the suffix says how to read each.

    A directory gives all files below it whose suffix is known, in the order of their paths.
    """

    def source(path: str) -> TextSource:
        kind = _kind(path)
        if kind is None:
            fix = (
                f"cannot tell what it holds; names end in {', '.join(_KINDS)}, and then maybe {', '.join(_COMPRESSED)}"
            )
            raise SourceError(path, None, fix)
        if kind is TextFile:
            return TextFile(path, separator, damaged)
        return kind(path, field, damaged)

    found = []
    for name in names:
        root = Path(name).expanduser()
        if not root.is_dir():
            found.append(source(name))
            continue
        paths = sorted((path for path in root.rglob("*") if path.is_file()), key=lambda path: path.as_posix())
        known = [str(path) for path in paths if _kind(str(path))]
        if not known:
            raise SourceError(name, None, f"holds no file that ends in one of {', '.join(_KINDS)}")
        found += map(source, known)
    return found


def _kind(path: str) -> type | None:
    suffixes = Path(path).suffixes
    if suffixes and suffixes[-1] in _COMPRESSED:
        suffixes = suffixes[:-1]
    return _KINDS.get(suffixes[-1]) if suffixes else None


def prepare_verb(args: argparse.Namespace, overrides: list[tuple[str, str]]) -> int:
    sources, tokenizer = _asked(args, overrides)
    manifest = prepare(sources, tokenizer, args.out, shard_tokens=args.shard_tokens)
    directory = ShardDirectory(args.out)
    if args.verify:
        with ProgressBar("verify shards", len(manifest["shards"])) as bar:
            for record in manifest["shards"]:
                directory.verify_shard(record)
                bar.advance()
    left_out = [f"{manifest[f'{what}_records']:,} {what}" for what in ("bad", "empty") if manifest[f"{what}_records"]]
    print(
        f"{args.out}: {len(manifest['shards'])} shards, {manifest['documents']:,} documents, "
        f"{manifest['tokens']:,} tokens; left out: {' and '.join(left_out) or 'no'} records"
    )
    print(f"train on it: --config.data.mixture.0.source=\"{{'kind': '{Shards.kind}', 'path': '{args.out}'}}\"")
    return 0


def _asked(args: argparse.Namespace, overrides: list[tuple[str, str]]) -> tuple[list[TextSource], TokenizerSpec]:
    if overrides and not args.config:
        raise ConfigError(f"config.{overrides[0][0]}", overrides[0][1], "there is no --config=FILE to change")
    data = resolve(load_config(args.config), overrides).data if args.config else None
    tokenizer = data.tokenizer if data else _tokenizer(args)
    if args.config and args.tokenizer:
        raise ConfigError("--tokenizer", args.tokenizer, "the config has one; leave one of them out")
    if args.sources:
        damaged = args.on_bad_record or "error"
        return sources_named(args.sources, field=args.field, separator=args.separator, damaged=damaged), tokenizer
    if data is None:
        raise ConfigError("SRC", ConfigError.ABSENT, "name files or directories, or a --config=FILE whose data to take")
    texts = {str(i): x.source for i, x in enumerate(data.mixture) if not x.is_task and not isinstance(x.source, Shards)}
    if not texts:
        raise ConfigError("config.data.mixture", ConfigError.ABSENT, "has no text; name files: irope prepare SRC …")
    if args.ingredient is None and len(texts) > 1:
        fix = f"the mixture has several texts; prepare each by itself, into an --out of its own: {', '.join(texts)}"
        raise ConfigError("--ingredient", ConfigError.ABSENT, fix)
    chosen = next(iter(texts)) if args.ingredient is None else str(args.ingredient)
    if chosen not in texts:
        raise ConfigError("--ingredient", args.ingredient, f"is no text of the mixture; {nearest(chosen, texts)}")
    source = texts[chosen]
    if args.on_bad_record and any(field.name == "damaged" for field in fields(source)):
        source = replace(source, damaged=args.on_bad_record)
    return [source], tokenizer


def _tokenizer(args: argparse.Namespace) -> TokenizerSpec:
    if not args.tokenizer:
        fix = "give a tokenizer.json, or bytes, or the --config=FILE that will be trained"
        raise ConfigError("--tokenizer", ConfigError.ABSENT, fix)
    return ByteTokenizer() if args.tokenizer == "bytes" else TokenizerFile(args.tokenizer, args.bos, args.eos)
