"""The command line as a user meets it: one line for every mistake, help that teaches, and what `irope show` prints."""

import ast
import contextlib
import io
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from irope_jax import cli, run
from irope_jax.core.config import ConfigError, fingerprint, to_dict
from irope_jax.experiment import load_config, resolve

CONFIGS = Path(__file__).parent.parent / "configs"
DEBUG = f"--config={CONFIGS / 'debug.py'}"


def irope(capsys, *arguments):
    """Exit code, standard output, standard error."""
    code = cli.main(list(arguments))
    out, err = capsys.readouterr()
    return code, out, err


def assert_one_line(code, err, *parts):
    assert code == 2, err
    assert err.startswith("irope: error: ") and err.endswith("\n") and err.count("\n") == 1, err
    assert "Traceback" not in err
    for part in parts:
        assert part in err, (part, err)


MISTAKES = {
    "misspelt field": (["--config.model.num_layerz=3"], "config.model.num_layerz=3", "did you mean 'num_layers'?"),
    "misspelt part": (["--config.modle.num_layers=3"], "config.modle", "did you mean 'model'?"),
    "wrong type": (["--config.model.d_model=wide"], "config.model.d_model=wide", "expected int"),
    "number for a word": (["--config.model.remat=3"], "config.model.remat=3", "one of: none, full, attention, dots"),
    "unknown kind": (["--config.train.optimizer.schedule.kind=cosin"], "schedule.kind=cosin:", "mean 'cosine'?"),
    "unknown mask": (["--config.model.pattern.0.mask.kind=slide"], "pattern.0.mask.kind=slide:", "sliding"),
    "heads": (["--config.model.num_kv_heads=3"], "config.model.num_kv_heads=3", "must divide num_heads=4"),
    "odd width": (["--config.model.head_dim=15"], "config.model.head_dim=15", "even"),
    "negative steps": (["--config.train.steps=-5"], "config.train.steps=-5", "must be at least 1"),
    "long warm-up": (["--config.train.optimizer.schedule.warmup=500"], "optimizer.schedule", "warmup=500", "100 steps"),
    "small vocabulary": (["--config.model.vocab_size=100"], "config.model.vocab_size=100", "needs at least 299"),
    "few symbols": (["--config.data.tokenizer.num_symbols=8"], "tokenizer.num_symbols=8", "needs 32 symbols"),
    "too many facts": (["--config.evals.1.facts=40"], "config.evals.1.facts=40", "keys are unique"),
    "no room for facts": (["--config.evals.1.lengths=(64,8)"], "config.evals.1.lengths=(64, 8)", "8 is too short"),
    "same name twice": (["--config.evals.0.name=retrieval"], "config.evals.1.name='retrieval'", "rename"),
    "accumulation": (["--config.train.accumulate=3"], "config.train.accumulate=3", "data.batch_size=16"),
    "packing multiple": (["--config.data.packing.document_multiple=24"], "document_multiple=24", "seq_len=64"),
    "no such index": (["--config.evals.7.name=x"], "config.evals.7", "use 0 to 1"),
    "below a number": (["--config.seed.x=1"], "config.seed", "plain value"),
    "no value": (["--config.model.num_layers"], "config.model.num_layers", "--config.model.num_layers=VALUE"),
    "no value, then a flag": (["--config.seed", "--help"], "config.seed", "--config.seed=VALUE"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_a_value_is_one_line_that_names_field_value_and_fix(capsys, mistake):
    overrides, *parts = MISTAKES[mistake]
    code, _, err = irope(capsys, "show", DEBUG, *overrides)
    assert_one_line(code, err, *parts)


MESH_MISTAKES = {
    "too few devices": (["--config.mesh.data=3"], "config.mesh.data=3", "3 devices but 8 are present"),
    "does not divide": (["--config.mesh.fsdp=3"], "config.mesh.data=-1", "does not divide the 8 present"),
    "no such axis": (["--config.mesh.dta=2"], "config.mesh.dta=2", "did you mean 'data'?"),
    "batch": (["--config.data.batch_size=12"], "config.data.batch_size=12", "8", "try 8 or 16"),
    "length": (
        ["--config.data.seq_len=63", "--config.mesh.context=2"],
        "config.data.seq_len=63",
        "mesh.context in zigzag order = 4",
        "try 60 or 64",
    ),
    "evaluated length": (
        ["--config.evals.0.lengths=(64,101)", "--config.mesh.context=2"],
        "config.evals.0.lengths=101",
        "mesh.context = 2",
    ),
    "heads": (["--config.mesh.tensor=4"], "config.mesh.tensor=4", "attention/key", "use 2"),
}


@pytest.mark.parametrize("mistake", MESH_MISTAKES)
def test_a_run_that_does_not_fit_the_devices_is_refused_before_anything_is_written(capsys, tmp_path, mistake):
    overrides, *parts = MESH_MISTAKES[mistake]
    code, _, err = irope(capsys, "train", DEBUG, f"--run-dir={tmp_path / 'run'}", *overrides)
    assert_one_line(code, err, *parts)
    assert not (tmp_path / "run").exists()


def test_too_little_text_to_evaluate_is_said_before_the_run_not_in_its_middle(capsys, tmp_path):
    code, _, err = irope(capsys, "train", DEBUG, f"--run-dir={tmp_path / 'run'}", "--config.evals.0.tokens=100000000")
    assert_one_line(code, err, "config.evals.perplexity.tokens=100000000", "windows of 64 tokens")
    assert not (tmp_path / "run").exists()


COMMANDS = {
    "no verb": ([], "VERB", "irope --help"),
    "unknown verb": (["trian", DEBUG], "'trian'", "did you mean 'train'?"),
    "unknown flag": (["train", DEBUG, "--run_dir=x"], "--run_dir='x'", "did you mean '--run-dir'?"),
    "no config": (["train"], "--config", "irope train --help"),
    "bad choice": (["train", DEBUG, "--on-config-change=maybe"], "'maybe'", "accept"),
    "step is no number": (["eval", "x", "--step=last"], "--step", "'last'"),
    "missing file": (["show", f"--config={CONFIGS / 'debgu.py'}"], "debgu.py", "no such file; did you", "debug.py"),
    "missing directory": (["show", "--config=nowhere/x.py"], "nowhere/x.py", "no such file"),
    "not a config": (["show", "--config=debug"], "config='debug'", "name a .py file"),
    "argument not taken": (["show", f"{DEBUG}:big"], "debug.py:big", "takes no argument"),
    "argument unknown": (["show", f"--config={CONFIGS / 'quickstart.py'}:foo"], "quickstart.py:foo", "irope, rope"),
    "report with values": (["report", "x", "--config.seed=1"], "config.seed='1'", "takes no config"),
}


@pytest.mark.parametrize("mistake", COMMANDS)
def test_a_mistake_in_the_command_is_one_line_too(capsys, mistake):
    arguments, *parts = COMMANDS[mistake]
    code, _, err = irope(capsys, *arguments)
    assert_one_line(code, err, *parts)


FILES = {
    "raises": ("x.py", "def get_config():\n    raise RuntimeError('two\\nlines')\n", "RuntimeError: two lines"),
    "does not parse": ("x.py", "def get_config(:\n", "SyntaxError"),
    "no get_config": ("x.py", "config = 3\n", "define one that returns a ConfigDict"),
    "returns nothing": ("x.py", "def get_config():\n    pass\n", "expected a dictionary of Experiment fields"),
    "empty": ("x.py", "def get_config():\n    return {}\n", "required by Experiment"),
    "torn json": ("x.json", '{"config": {"name": "x", ', "not a readable JSON file"),
    "json list": ("x.json", "[1, 2]", "expected a JSON object"),
}


@pytest.mark.parametrize("mistake", FILES)
def test_a_config_file_that_is_wrong_inside_is_one_line_too(capsys, tmp_path, mistake):
    name, text, part = FILES[mistake]
    (tmp_path / name).write_text(text)
    code, _, err = irope(capsys, "show", f"--config={tmp_path / name}")
    assert_one_line(code, err, "config", part)


def test_failures_of_a_run_are_one_line_and_exit_code_1(capsys, tmp_path):
    for arguments in (["eval", str(tmp_path)], ["report", str(tmp_path / "nothing")]):
        code, _, err = irope(capsys, *arguments)
        assert code == 1 and err.startswith("irope: error: ") and err.count("\n") == 1, err
        assert str(tmp_path) in err


@pytest.mark.parametrize("verb", ["train", "eval", "report", "show"])
def test_help_of_every_verb_teaches_by_examples_that_parse(capsys, verb):
    with pytest.raises(SystemExit) as ended:
        cli.main([verb, "--help"])
    text = capsys.readouterr().out
    assert ended.value.code == 0
    examples = re.findall(rf"^  irope ({verb} .+)$", text, flags=re.MULTILINE)
    assert len(examples) >= 2, text
    for example in examples:
        rest, _ = cli.split_overrides(shlex.split(example))
        assert cli._parse(rest).verb == verb


def test_help_lists_every_verb_with_an_example(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["--help"])
    text = capsys.readouterr().out
    assert ended.value.code == 0
    for verb in run.VERBS:
        assert re.search(rf"^  irope {verb} ", text, flags=re.MULTILINE), verb


def test_overrides_are_taken_out_with_and_without_an_equals_sign():
    arguments = ["train", "--config=x.py", "--config.a.b=1=2", "--config.c", "-3", "--run-dir=d"]
    rest, overrides = cli.split_overrides(arguments)
    assert rest == ["train", "--config=x.py", "--run-dir=d"]
    assert overrides == [("a.b", "1=2"), ("c", "-3")]
    with pytest.raises(ConfigError):
        cli.split_overrides(["--config.a"])


# ---- irope show


@pytest.fixture(scope="module")
def shown():
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert cli.main(["show", DEBUG]) == 0
    return out.getvalue()


def values_of(text):
    return dict(re.findall(r"^  (config\.\S+) = (.*)$", text, flags=re.MULTILINE))


def test_show_prints_every_value_of_the_resolved_config(shown):
    def leaves(value, path):
        if isinstance(value, dict):
            return [leaf for key, inner in value.items() for leaf in leaves(inner, f"{path}.{key}")]
        if isinstance(value, list) and value and isinstance(value[0], dict):
            return [leaf for i, inner in enumerate(value) for leaf in leaves(inner, f"{path}.{i}")]
        return [(path, value)]

    wanted = leaves(to_dict(resolve(load_config(str(CONFIGS / "debug.py")))), "config")
    assert {path: ast.literal_eval(text) for path, text in values_of(shown).items()} == dict(wanted)


def test_show_draws_the_layers_and_counts_parameters_by_part(shown):
    lines = shown.splitlines()
    assert "4 layers = 1 x a period of 4" in lines
    drawn = [line for line in lines if "RoPE theta" in line or "NoPE" in line]
    assert [("chunks of 16" in line, "global" in line) for line in drawn] == [(True, False)] * 3 + [(False, True)]
    found = re.findall(r"^  (\w+) +([\d,]+)$", shown, re.MULTILINE)
    counts = {name: int(count.replace(",", "")) for name, count in found}
    # By hand: V D; per layer D N H + 2 D K H + N H D; per layer 3 D F; two norms a layer and the last.
    assert counts == {
        "embedding": 304 * 32,
        "attention": 4 * (2 * 32 * 4 * 16 + 2 * 32 * 2 * 16),
        "feed_forward": 4 * 3 * 32 * 64,
        "norms": (2 * 4 + 1) * 32,
        "total": 304 * 32 + 4 * 6144 + 4 * 6144 + 288,
    }


def test_a_printed_line_pasted_back_changes_nothing_and_changed_it_changes_just_that(capsys, shown):
    values = values_of(shown)
    pasted = [f"--{path}={text.strip(chr(39))}" for path, text in values.items() if not path.endswith(".kind")]
    code, out, err = irope(capsys, "show", DEBUG, *pasted)
    assert code == 0, err
    assert out == shown
    code, out, err = irope(capsys, "show", DEBUG, "--config.model.pattern.0.mask.size=8")
    assert {k for k, v in values_of(out).items() if values[k] != v} == {"config.model.pattern.0.mask.size"}


def test_show_reads_a_config_json_without_running_anything(capsys, tmp_path, shown):
    """What could run if it were Python stays text."""
    experiment = resolve(load_config(str(CONFIGS / "debug.py")))
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"format": 1, "fingerprint": fingerprint(experiment), "config": to_dict(experiment)}))
    code, out, _ = irope(capsys, "show", f"--config={path}")
    assert code == 0 and out == shown
    witness = tmp_path / "ran"
    evil = f"__import__('pathlib').Path({str(witness)!r}).touch()"
    for field in ("seed", "name"):
        path.write_text(json.dumps({"config": to_dict(experiment) | {field: evil}}))
        irope(capsys, "show", f"--config={path}")
        irope(capsys, "show", DEBUG, f"--config.{field}={evil}")
    assert not witness.exists()


def test_whoever_reads_the_output_may_leave():
    """`irope sweep … --list | head`: no traceback, and the exit code that shells know."""
    grid = str(Path(__file__).parents[1] / "experiments" / "what_irope_buys")
    command = [sys.executable, "-c", "from irope_jax.cli import main; raise SystemExit(main())"]
    process = subprocess.Popen(
        [*command, "sweep", grid, "--list=commands"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.close()
    _, said = process.communicate()
    assert (process.returncode, said) == (141, b"")
