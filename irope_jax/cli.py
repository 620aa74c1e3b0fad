"""The `irope` command: verbs, flags, help, and errors as one line with an exit code.

Exit codes: 0 done; 1 the run failed; 2 the command or the config is wrong; 128 + N stopped by signal N, all saved.
The work behind each verb is in `run.py`.
"""

from __future__ import annotations

import argparse
import os
import select
import signal
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

from irope_jax import __version__
from irope_jax.core.config import ConfigError, nearest
from irope_jax.generate_flags import add_generate
from irope_jax.plan_flags import add_plan
from irope_jax.search_flags import add_search
from irope_jax.sweep_flags import add_sweep
from irope_jax.transfer_flags import add_export, add_import

DESCRIPTION = """\
Train, extend, measure and compare long-context language models (iRoPE and its rivals) in JAX.

A run is a config file; every value of it can be changed on the command line:

  irope show   --config=configs/debug.py                      what would run: values, layers, bytes a device
  irope plan   --config=configs/debug.py --target=v5e:2x2     what a step costs on chips that are not here
  irope train  --config=configs/debug.py                      train into runs/debug, or go on where it stopped
  irope train  --config=configs/debug.py --config.model.num_layers=8 --run-dir=runs/deep
  irope launch --processes=4 -- train --config=configs/debug.py
                                                              four processes here, started again if one dies
  irope prepare texts/ --tokenizer=tokenizer.json --out=shards  text, JSONL or parquet as token shards to train on
  irope eval   runs/debug                                     evaluate its newest checkpoint
  irope generate --checkpoint=runs/debug --prompt='It was '   what it writes on
  irope report runs/debug runs/deep                           tables and pictures of several runs on one page
  irope sweep  experiments/what_irope_buys/grid.py            every run of a study, those left over if started again
  irope import model.gguf runs/model                          a Hugging Face or GGUF model as a run directory
  irope export runs/model exported/model                      a run as a Hugging Face folder, or a GGUF file
  irope search-rope --checkpoint=runs/extend_tiny --config=configs/search_rope.py:tiny
                                                              factors that stretch a trained RoPE model
"""

CONFIG_HELP = """\
configs:
  --config=FILE.py          a file with get_config() returning an ml_collections.ConfigDict
  --config=FILE.py:ARG      the same, get_config("ARG")
  --config=RUN/config.json  the resolved values of an earlier run
  --config.a.b.c=VALUE      change one value; list entries by number, union members by kind:
                              --config.train.optimizer.learning_rate=1e-3
                              --config.model.pattern.3.mask.kind=sliding --config.model.pattern.3.mask.size=64
  A .py config is a program: read one before running it. A config.json is only data.
"""


class _Formatter(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=30, width=110)


class _Parser(argparse.ArgumentParser):
    """Reports a mistake as every other mistake is reported: one line, no usage."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(self.prog, ConfigError.ABSENT, f"{message}; see `{self.prog} --help`")


HOSTS_HELP = """\
On SLURM, Open MPI, Kubernetes (an indexed Job or JobSet) and Cloud TPU the processes find each other. Elsewhere start
each with these three, or with IROPE_COORDINATOR, IROPE_PROCESS_ID and IROPE_NUM_PROCESSES in its environment. The run
directory must lie on a file system that all of them share."""


def _add_hosts(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("several processes", HOSTS_HELP)
    group.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 listens; any free port of its host")
    group.add_argument("--process-id", type=int, metavar="N", help="which process this is, from 0")
    group.add_argument(
        "--num-processes", type=int, metavar="M", help="how many there are; 1 works alone on any cluster"
    )
    group.add_argument("--join-timeout", type=int, metavar="SECONDS", help="how long to wait for the others (300)")


def _parser() -> tuple[_Parser, dict[str, _Parser]]:
    """The parser, and those of the verbs."""
    parser = _Parser(prog="irope", description=DESCRIPTION, formatter_class=_Formatter)
    parser.add_argument("--version", action="version", version=f"irope {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)

    def verb(name: str, summary: str, text: str, epilog: str = "") -> argparse.ArgumentParser:
        return verbs.add_parser(
            name, help=summary, description=text, epilog=epilog, formatter_class=_Formatter, allow_abbrev=False
        )

    train = verb(
        "train",
        "train a config, or go on with it",
        """\
Train a model. The run directory holds everything: config.json, records.jsonl, tensorboard/, checkpoints/.

examples:
  irope train --config=configs/debug.py
  irope train --config=configs/quickstart.py:irope --config.train.steps=100 --run-dir=runs/short

Started again with the same command, it goes on from the newest checkpoint, bit-equal to a run that was never cut.
SIGTERM and Ctrl-C save and leave (exit code 128 + signal); a second Ctrl-C leaves at once.
""",
        CONFIG_HELP,
    )
    train.add_argument("--config", required=True, metavar="FILE[:ARG]", help="config file, see below")
    train.add_argument("--run-dir", metavar="DIR", help="run directory (default: runs/NAME of the config)")
    train.add_argument(
        "--on-config-change",
        choices=("refuse", "accept"),
        default="refuse",
        help="when the run directory has other values: refuse, listing them (default), or go on and record it",
    )
    train.add_argument(
        "--profile",
        metavar="FIRST:COUNT",
        help="trace so many steps from that one into DIR/profile, for xprof, and say which parts take the time",
    )
    _add_hosts(train)

    start = verb(
        "launch",
        "several processes of a run on this machine",
        """\
Start `irope train` (or eval) in several processes that find each other, with their output marked by number. When one
dies the others are ended and all are started again, which goes on from the newest checkpoint. SIGTERM, SIGUSR1 and
Ctrl-C go to all of them: they save and leave. On several machines use scripts/launch/.

examples:
  irope launch --processes=4 -- train --config=configs/debug.py --config.mesh.data=4
  irope launch --processes=2 --devices-per-process=4 --restarts=10 -- train --config=configs/quickstart.py:irope

The exit code is that of the run; 2, a wrong command or config, is not tried again.
""",
    )
    start.add_argument("--processes", type=int, required=True, metavar="N", help="how many processes")
    start.add_argument(
        "--devices-per-process", type=int, metavar="N", help="simulated CPU devices in each (default: as jax finds)"
    )
    start.add_argument(
        "--restarts", type=int, default=3, metavar="N", help="how many times to start all again (default: 3)"
    )

    make = verb(
        "prepare",
        "text, JSONL or parquet as token shards",
        """\
Turn text into token shards that training reads piece by piece: SRC are files, quoted glob patterns or directories of
.txt, .md, .jsonl and .parquet, possibly compressed (.xz, .gz, .bz2, .zst); without any, the text of a config is taken.
OUT is a directory, gs://BUCKET/... or s3://BUCKET/...; it holds zarr3 arrays, and manifest.json when all is whole.

examples:
  irope prepare texts/ --tokenizer=tokenizer.json --bos='<s>' --eos='</s>' --out=shards
  irope prepare 'web/*.jsonl.zst' --config=configs/long.py --on-bad-record=skip --out=gs://bucket/shards
  irope prepare --config=configs/quickstart.py:irope --out=shards --verify
  irope train   --config=configs/long.py --config.data.mixture.0.source="{'kind': 'shards', 'path': 'shards'}"

Killed and started again with the same command, it keeps the shards that are whole and goes on; the result is the same.
""",
        CONFIG_HELP,
    )
    make.add_argument("sources", nargs="*", metavar="SRC", help="files, patterns, directories")
    make.add_argument("--out", required=True, metavar="OUT", help="where to write")
    make.add_argument("--config", metavar="FILE[:ARG]", help="config with the tokenizer, and the text if no SRC")
    make.add_argument("--ingredient", type=int, metavar="N", help="which text of the config's mixture, from 0")
    make.add_argument("--tokenizer", metavar="FILE", help="tokenizer.json, or bytes (default: that of the config)")
    make.add_argument("--bos", default="", metavar="TEXT", help="token that begins a document (default: a new id)")
    make.add_argument("--eos", default="", metavar="TEXT", help="token that ends a document (default: a new id)")
    make.add_argument("--field", default="text", metavar="NAME", help="key or column of the text (default: text)")
    make.add_argument(
        "--separator", default="", metavar="TEXT", help="between documents of a text file (default: it is one)"
    )
    make.add_argument(
        "--on-bad-record",
        choices=("error", "skip"),
        help="a line, row or file that cannot be read: stop and name it (default), or leave it out and count it",
    )
    make.add_argument(
        "--shard-tokens", type=int, default=1 << 25, metavar="N", help="tokens of a shard (default: 33554432)"
    )
    make.add_argument("--verify", action="store_true", help="in the end read all shards and compare their checksums")

    evaluate = verb(
        "eval",
        "evaluate a checkpoint of a run",
        """\
Evaluate a checkpoint with the evaluations of its config; print a table and add the measurements to the run's records.
Given a config file instead of a run, evaluate its model untrained: with the weights that train.init_from names, else
with fresh ones (for what depends on shapes only, such as memory and time); records go to a run directory of its own.

examples:
  irope eval runs/debug
  irope eval runs/debug --step=200 --only=retrieval
  irope eval runs/debug --config.evals.1.lengths='(256, 1024, 4096)'
  irope eval runs/model --config.evals="({'kind': 'text_tasks', 'name': 'ruler', 'lengths': (4096, 8192)},)"
  irope eval --config=configs/million.py:log_n_64
""",
        "Values are changed as in `irope train`: --config.a.b=VALUE; what is measured is then printed, not recorded,\n"
        "but for evaluations under a name that the run does not have yet. A grid of tasks goes on where it was killed.",
    )
    evaluate.add_argument("run", metavar="RUN", nargs="?", help="run directory")
    evaluate.add_argument("--config", metavar="FILE[:ARG]", help="config file instead of a run")
    evaluate.add_argument("--run-dir", metavar="DIR", help="with --config: its run directory (default: runs/NAME)")
    evaluate.add_argument("--step", type=int, metavar="N", help="checkpoint to read (default: the newest)")
    evaluate.add_argument("--only", metavar="NAME", action="append", help="run only this evaluation; may be repeated")
    _add_hosts(evaluate)

    _add_hosts(add_generate(verb))

    report = verb(
        "report",
        "tables and pictures of runs",
        """\
Write a page with pictures: loss, perplexity by position, retrieval by length, heat maps; and print its table. As
Markdown, and as one HTML file that opens offline. Of a study (a folder with grid.py, see `irope sweep`) the page has
its question, prediction and verdict, and means over seeds with their spread.

examples:
  irope report runs/debug
  irope report runs/quickstart/irope runs/quickstart/rope --out=runs/quickstart/report
  irope report experiments/what_irope_buys --only=headline
  irope report experiments/what_irope_buys --beside=../before/runs/what_irope_buys --out=compared
  irope report experiments/what_irope_buys experiments/extension_methods --out=compared
""",
    )
    report.add_argument("runs", nargs="+", metavar="RUN", help="run directories, or folders of studies")
    report.add_argument(
        "--out",
        metavar="DIR",
        help="where to write (default: report/ beside or in the first run; a study's folder; of a --scale its runs)",
    )
    report.add_argument("--only", action="append", metavar="WORD", help="of a study: a tag, arm, cell or seed; repeats")
    report.add_argument("--scale", metavar="NAME", help="of a study: which size of it")
    report.add_argument("--runs", dest="runs_in", metavar="DIR", help="of a study: folder of its runs (runs/STUDY)")
    report.add_argument(
        "--beside", action="append", metavar="DIR",
        help="of a study: folder of its runs of another commit, to compare; repeatable",
    )  # fmt: skip

    add_import(verb)
    add_export(verb)

    add_search(verb, CONFIG_HELP)

    show = verb(
        "show",
        "print what a config resolves to",
        """\
Print every value of a resolved config in the form that changes it, the layers as a drawing, parameters by part, and
where it all lies: each parameter with the mesh axes that cut it and its bytes on a device, the totals of parameters,
optimizer state and gradients, and, where the mesh cuts the sequence, what each layer's attention sends.
Nothing is trained, no data is read and nothing is allocated: devices may be described that are not here. --decode adds
the bytes of a KV cache.

examples:
  irope show --config=configs/quickstart.py:irope
  irope show --config=configs/debug.py --config.model.num_layers=8
  irope show --config=configs/debug.py --devices=64 --config.mesh.fsdp=8 --config.mesh.tensor=2
  irope show --config=runs/debug/config.json
  irope show --config=configs/llama4_scout.py --decode=1048576
""",
        CONFIG_HELP,
    )
    show.add_argument("--config", required=True, metavar="FILE[:ARG]", help="config file, see below")
    show.add_argument(
        "--devices",
        type=int,
        metavar="N",
        help="lay it out on N devices (default: as many as the mesh takes, or those present if an axis is -1)",
    )
    show.add_argument(
        "--decode", type=int, metavar="LENGTH", help="also what the cache of a row of so many tokens takes, by layer"
    )
    add_plan(verb, CONFIG_HELP)
    add_sweep(verb)
    return parser, verbs.choices


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Raises `ConfigError` for an unknown verb or flag, with the nearest known one."""
    parser, verbs = _parser()
    if arguments and not arguments[0].startswith("-") and arguments[0] not in verbs:
        raise ConfigError("irope", arguments[0], f"no such verb; {nearest(arguments[0], verbs)}")
    parsed, unknown = parser.parse_known_args(arguments)
    if unknown:
        flag, equals, value = unknown[0].partition("=")
        takes = [option for option in verbs[parsed.verb]._option_string_actions if option.startswith("--")]
        fix = f"irope {parsed.verb} takes no such argument; {nearest(flag, takes)}"
        raise ConfigError(flag, value if equals else ConfigError.ABSENT, fix)
    return parsed


def split_overrides(arguments: Sequence[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """Take `--config.a.b=value` and `--config.a.b value` out of an argument list."""
    rest, overrides, pending = [], [], None
    for argument in arguments:
        if pending is not None and not argument.startswith("--"):
            overrides.append((pending, argument))
            pending = None
        elif pending is not None:
            break
        elif argument.startswith("--config."):
            name, equals, value = argument.removeprefix("--config.").partition("=")
            if equals:
                overrides.append((name, value))
            else:
                pending = name
        else:
            rest.append(argument)
    if pending is not None:
        raise ConfigError(f"config.{pending}", ConfigError.ABSENT, f"give it a value: --config.{pending}=VALUE")
    return rest, overrides


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code."""
    try:
        arguments = list(sys.argv[1:] if arguments is None else arguments)
        if arguments[:1] == ["launch"]:
            return _launch(arguments)
        rest, overrides = split_overrides(arguments)
        parsed = _parse(rest)
        if overrides and parsed.verb == "report":
            fix = "irope report reads finished runs; it takes no config"
            raise ConfigError(f"config.{overrides[0][0]}", overrides[0][1], fix)
        from irope_jax import run  # after parsing, so that --help does not wait for jax

        code = run.VERBS[parsed.verb](parsed, overrides)
        sys.stdout.flush()
        return code
    except ConfigError as error:
        print(f"irope: error: {error}", file=sys.stderr)
        return _leave(2)
    except KeyboardInterrupt:
        print("irope: interrupted; what was saved stays", file=sys.stderr)
        return _leave(130)
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _nobody_reads():
            return _leave(128 + signal.SIGPIPE)
        from irope_jax.run import EXPECTED_ERRORS

        if not isinstance(error, EXPECTED_ERRORS) or os.environ.get("IROPE_TRACEBACK"):
            if not _others_wait():
                raise
            from irope_jax.core import hosts

            hosts.end_if_another_is_gone(error)
            traceback.print_exc()
        else:
            print(f"irope: error: {error}", file=sys.stderr)
        return _leave(getattr(error, "exit_code", 1))


def _nobody_reads() -> bool:
    """Whether who read our output has left, as `| head` does; then nothing more is written there."""
    pipe = select.poll()
    pipe.register(sys.stdout, select.POLLOUT)
    if not any(flags & select.POLLERR for _, flags in pipe.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return True


def _launch(arguments: list[str]) -> int:
    """What follows `--` belongs to the processes that are started."""
    from irope_jax.launch import launch_verb  # and not `run`: no jax here

    cut = arguments.index("--") if "--" in arguments else len(arguments)
    return launch_verb(_parse(arguments[:cut]), arguments[cut + 1 :])


def _others_wait() -> bool:
    hosts = sys.modules.get("irope_jax.core.hosts")  # not there yet: nothing was started
    return hosts is not None and hosts.others_wait()


def _leave(code: int) -> int:
    """The exit code of a failure; where other processes wait for this one, it ends now.

    In order it would wait until all leave, while they may be waiting for its part of a computation.
    """
    if _others_wait():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


if __name__ == "__main__":
    sys.exit(main())
