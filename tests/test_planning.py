"""`irope plan` on the command line."""

import json
import re

import pytest

from irope_jax.cli import main

DEBUG = ["plan", "--config=configs/debug.py"]


@pytest.fixture(autouse=True)
def nothing_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--target=v5p"], "give a chip and a topology"),
        (["--target=v9x:2x2"], "v9x:2x2"),
        (["--target=,"], "name chips and how many"),
        (["--target=cpu:0"], "number of simulated devices"),
        (["--target=v5e:2x2", "--seq-len=many", "--closed-form"], "whole numbers of tokens"),
        (["--target=v5e:2x2", "--seq-len=0", "--closed-form"], "use 1 or more"),
        (["--target=v5e:2x2", "--rows=0"], "--rows"),
        (["--target=v5e:2x2", "--mode=sleep"], "invalid choice"),
        (["--target=v5e:2x2", "--closed-form", "--config.mesh.data=3"], "config.mesh"),
    ],
)
def test_odd_input_is_one_line_and_exit_code_2(arguments, said, capsys):
    assert main([*DEBUG, *arguments]) == 2
    out, err = capsys.readouterr()
    assert said in out + err


def test_without_the_cuda_plugin_a_line_says_what_to_install_and_the_closed_form_answers(capsys):
    pytest.importorskip("jax")
    assert main([*DEBUG, "--target=h100:8", "--config.mesh.data=8"]) == 0
    out = capsys.readouterr().out
    assert "irope-jax[cuda]" in out or "compiled in" in out
    assert "by hand" in out and "80 GB" in out


def test_json_of_several_targets_and_lengths(capsys):
    arguments = ["--target=v5e:2x2,v6e:2x2", "--seq-len=64,128", "--closed-form", "--json", "--config.mesh.data=4"]
    assert main([*DEBUG, *arguments]) == 0
    values = json.loads(capsys.readouterr().out)
    assert [(one["target"], one["seq_len"]) for one in values] == [
        (target, length) for target in ("v5e:2x2", "v6e:2x2") for length in (64, 128)
    ]
    assert all(one["fits"] and one["compiled"] is None and one["roofline"]["bound"] for one in values)


def test_a_picture_and_the_best_mesh_and_the_longest_context(capsys, tmp_path):
    picture = tmp_path / "bars.png"
    assert main([*DEBUG, "--target=v5e:2x2", "--closed-form", "--config.mesh.data=4", f"--plot={picture}"]) == 0
    assert picture.stat().st_size > 1000
    assert main([*DEBUG, "--target=v5e:2x2", "--closed-form", "--mesh=auto"]) == 0
    assert "config.mesh = dict(" in capsys.readouterr().out
    assert main([*DEBUG, "--target=v5e:2x2", "--closed-form", "--mesh=auto", "--json"]) == 0
    best = json.loads(capsys.readouterr().out)[0]
    assert best["paste"][0].startswith("config.mesh = dict(") and "remat" in best["candidate"]
    scout = ["plan", "--config=configs/llama4_scout.py:1m", "--target=v5p:4x4x4", "--closed-form", "--max-context"]
    assert main(scout) == 0
    assert "the longest that fits is" in capsys.readouterr().out
    for more, why in ((["--config.mesh.context=4"], r"8,192 tokens: \S+ GB of 95 by hand"), ([], r"mesh.context")):
        assert main([*scout, "--target=v5p:2x2x1", *more]) == 0
        assert re.search(f"{why}.*\nv5p:2x2x1: no length fits", capsys.readouterr().out)


def test_the_compiler_is_asked_once(capsys):
    arguments = [*DEBUG, "--target=cpu:1", "--config.model.num_layers=1", "--config.mesh.data=1"]
    assert main(arguments) == 0
    first = capsys.readouterr()
    assert main(arguments) == 0
    second = capsys.readouterr()
    assert "compiling" in first.err and "compiling" not in second.err and first.out == second.out
