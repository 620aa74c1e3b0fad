"""`irope generate`: what a trained model writes on from prompts, however long they are. Wiring only."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

import jax
import numpy as np

from irope_jax.context.strategy import megabytes
from irope_jax.core.config import ConfigError, fingerprint, to_dict
from irope_jax.core.hosts import agree, is_main_process
from irope_jax.core.progress import ProgressBar
from irope_jax.data.tokenizer import Tokenizer
from irope_jax.decode.generate import Generation, Generator, Row, Speed
from irope_jax.decode.sampling import Sampling
from irope_jax.decode.text import TextStream
from irope_jax.experiment import resolve, run_config
from irope_jax.join import join
from irope_jax.model.config import ModelConfig
from irope_jax.model.decodable import check_decodable, follows_length, for_documents_of
from irope_jax.sharding.mesh import MeshConfig, make_mesh
from irope_jax.stages import experiment_at
from irope_jax.train.state import params_for

log = logging.getLogger(__name__)


def generate_verb(args: argparse.Namespace, overrides: list[tuple[str, str]]) -> int:
    join(args)
    directory = Path(args.checkpoint)
    trained = experiment_at(directory, resolve(run_config(directory)), args.step)
    if not any(path.startswith("mesh.") for path, _ in overrides):
        # A prompt or a few: what devices can share is the text.
        spread = MeshConfig(data=1, context=-1)
        overrides = [*overrides, *((f"mesh.{axis}", str(size)) for axis, size in spread.sizes.items())]
    experiment = resolve(to_dict(trained), overrides)
    tokenizer = experiment.data.tokenizer
    book, prompts = prompts_of(args, tokenizer)
    spec = generation_of(args, experiment.model, tokenizer)
    said = [part.tolist() for part in (book, *prompts)]
    asked = [fingerprint(experiment), str(directory), args.step, fingerprint(spec), said]
    agree("what to generate", asked, "start every process with the same command and the same files")
    model = at_length(experiment.model, len(book) + max(map(len, prompts)) + spec.tokens, args.document_length)
    try:
        check_decodable(model)
    except ConfigError as error:
        raise error.within("config") from None
    streams = Streams(tokenizer, args.stop or (), shown_at_once=len(prompts) * spec.samples == 1)
    mesh = make_mesh(experiment.mesh.fill(jax.device_count()))
    with jax.set_mesh(mesh):
        params, step = params_for(directory, trained.model, experiment.model, mesh, args.step, for_decoding=True)
        log.info("%s, step %d", directory, step)
        generator, prefix = Generator(model, params, spec), None
        total = len(book) + sum(map(len, prompts))
        with ProgressBar("prompt tokens", total, quiet=not is_main_process()) as bar:
            if len(book) and len(prompts) > 1:
                prefix = generator.read([book], progress=bar.advance)
            elif len(book):
                prompts = [np.concatenate([book, prompts[0]])]
            rows = generator.generate(prompts, prefix=prefix, on_tokens=streams.take, progress=bar.advance)
    streams.end(rows)
    if is_main_process():
        print(speed_line(generator.speed), file=sys.stderr)
    return 0


def prompts_of(args: argparse.Namespace, tokenizer: Tokenizer) -> tuple[np.ndarray, list[np.ndarray]]:
    """Tokens of the file that all prompts follow (none without), and of each prompt.

    Raises:
      ConfigError: nothing to begin with, or a file that cannot be read.
    """
    start = np.asarray([] if args.no_bos else [tokenizer.bos_id], np.int32)
    texts = args.prompt or []
    if args.prompt_file is None:
        if not texts:
            raise ConfigError(
                "--prompt", ConfigError.ABSENT, "give the model something to go on from, or --prompt-file"
            )
        return np.zeros(0, np.int32), [np.concatenate([start, tokenizer.encode(text)]) for text in texts]
    try:
        raw = sys.stdin.buffer.read() if args.prompt_file == "-" else Path(args.prompt_file).read_bytes()
        text = raw.decode("utf-8")
    except OSError as error:
        raise ConfigError("--prompt-file", args.prompt_file, f"cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise ConfigError("--prompt-file", args.prompt_file, f"is not UTF-8 text ({error.reason})") from None
    return np.concatenate([start, tokenizer.encode(text)]), [tokenizer.encode(text) for text in texts or [""]]


def generation_of(args: argparse.Namespace, model: ModelConfig, tokenizer: Tokenizer) -> Generation:
    """Raises `ConfigError` for values that mean nothing."""
    asked = dict(top_k=args.top_k, top_p=args.top_p, min_p=args.min_p, temperature=args.temperature, seed=args.seed)
    return Generation(
        tokens=args.tokens,
        sampling=Sampling(**asked),
        stop_tokens=() if args.ignore_eos else (tokenizer.eos_id,),
        samples=args.samples,
        numbers=args.cache or model.precision.compute,
        piece=args.piece,
        guesses=args.guesses,
        offload=args.offload,
    )


def at_length(model: ModelConfig, tokens: int, said: int | None) -> ModelConfig:
    """The model to decode with, where frequencies follow the length of the document: by default that of all `tokens`.

    Raises:
      ConfigError: more tokens than were said.
    """
    if not follows_length(model):
        return model
    if said is not None and said < tokens:
        fix = f"prompt and new tokens are {tokens:,}; say at least that, or leave it out"
        raise ConfigError("--document-length", said, fix)
    log.info("rotations are those of a document of %d tokens, from its first token on", said or tokens)
    return for_documents_of(model, said or tokens)


class Streams:
    """Rows as text on standard output: one row as it comes, several one after the other when all have ended.

    Every process reads along, since a stop string ends a row on all of them; the first prints.
    """

    def __init__(self, tokenizer: Tokenizer, stops: list[str] | tuple[str, ...], *, shown_at_once: bool):
        self._new = lambda: TextStream(tokenizer, stops)
        self._rows: dict[tuple[int, int], TextStream] = {}
        self._at_once, self._prints = shown_at_once, is_main_process()

    def take(self, row: Row, new: list[int]) -> bool:
        stream = self._rows.setdefault((row.prompt, row.sample), self._new())
        self._show(stream.push(new))
        return stream.stopped

    def end(self, rows: list[Row]) -> None:
        for row in rows:
            stream = self._rows.setdefault((row.prompt, row.sample), self._new())
            self._show(stream.finish())
            if self._prints and not self._at_once:
                print(f"--- prompt {row.prompt + 1}, sample {row.sample + 1}\n{stream.text}")
        if self._prints and self._at_once:
            print()

    def _show(self, text: str) -> None:
        if self._prints and self._at_once and text:
            print(text, end="", flush=True)


def speed_line(speed: Speed) -> str:
    """What was read and written, and how fast; with compilation."""
    rate = lambda count, seconds: f"{count / seconds:,.0f}" if seconds > 0 else "-"
    return (
        f"read {speed.read:,} tokens in {speed.read_seconds:.1f} s ({rate(speed.read, speed.read_seconds)} tokens/s), "
        f"wrote {speed.made:,} in {speed.made_seconds:.1f} s ({rate(speed.made, speed.made_seconds)} tokens/s, "
        f"{speed.steps:,} steps); cache {megabytes(speed.cache_bytes)}"
    )
