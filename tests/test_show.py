"""`irope show`: what it says of where things lie, against arrays that are really put there and against sums by hand."""

import contextlib
import io
import math
import re
from pathlib import Path

import jax
import pytest

from irope_jax import cli, show
from irope_jax.core.config import ConfigError
from irope_jax.core.numerics import tree_bytes
from irope_jax.model.cache import CacheSpec, new_cache
from irope_jax.sharding.mesh import make_mesh
from irope_jax.train.optimizer import make_optimizer
from irope_jax.train.state import init_state
from tests import tiny

MESH = [("mesh.data", "1"), ("mesh.fsdp", "2"), ("mesh.context", "2"), ("mesh.tensor", "2")]


def shown(directory, *flags):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main(["show", f"--config={tiny.config_file(directory)}", *flags])
    return code, out.getvalue(), err.getvalue()


def table(lines, header):
    """Rows under a header line, as lists of cells; columns are two or more spaces apart."""
    start = next(i for i, line in enumerate(lines) if line.split()[:1] == [header])
    rows = []
    for line in lines[start + 1 :]:
        if not line.strip():
            break
        rows.append(re.split(r" {2,}", line.strip()))
    return rows


def number(text):
    return int(text.replace(",", ""))


def test_every_parameter_is_listed_with_the_bytes_a_device_then_holds():
    experiment = tiny.experiment(*MESH)
    lines = show.layout_lines(experiment, 8)
    assert lines[0] == "on 8 devices = fsdp 2 x context 2 x tensor 2"
    optimizer = make_optimizer(experiment.train.optimizer, experiment.train.steps)
    state = init_state(experiment.model, optimizer, make_mesh(experiment.mesh), 0)
    rows = {name: (shape, dtype, cuts, number(count)) for name, shape, dtype, cuts, count in table(lines, "parameter")}
    really = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(state.params)
    }
    assert rows.keys() == really.keys()
    held = lambda leaf: leaf.addressable_shards[3].data.nbytes
    for name, leaf in really.items():
        assert rows[name][0] == str(list(leaf.shape)) and rows[name][1] == "float32"
        assert rows[name][3] == held(leaf), name
    assert rows["embedding"][2] == "tensor, fsdp+context"
    assert rows["periods/layer_0/attention/out"][2] == "-, tensor, -, fsdp+context"
    assert rows["final_norm/scale"][2] == "whole"

    totals = {name: [number(cell) for cell in cells[::2]] for name, *cells in table(lines, "held")}
    params = sum(map(held, really.values()))
    adam = sum(map(held, jax.tree.leaves(state.opt_state)))
    assert [row[0] for row in totals.values()] == [params, adam, params, 2 * params + adam]
    assert totals["parameters"][1] == sum(leaf.nbytes for leaf in really.values())
    assert totals["together"][1] == sum(row[1] for name, row in totals.items() if name != "together")


def test_mesh_axes_of_one_device_cut_nothing():
    lines = show.layout_lines(tiny.experiment(("mesh.fsdp", "2")), 8)
    cuts = {name: cut for name, _, _, cut, _ in table(lines, "parameter")}
    assert lines[0] == "on 8 devices = data 4 x fsdp 2" and cuts["embedding"] == "-, fsdp"
    assert {cut for cut in (row[3] for row in table(show.layout_lines(tiny.experiment(), 1), "parameter"))} == {"whole"}


def test_columns_stand_under_one_another():
    lines = show.layout_lines(tiny.experiment(*MESH), 8)
    rows = lines[1 : lines.index("")]
    assert len({len(line) for line in rows}) == 1  # right-aligned numbers at the end
    assert all(line.startswith("  ") and line[2] != " " for line in rows)


def test_a_bigger_cluster_is_described_and_nothing_is_allocated(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: pytest.fail("no device need be asked"))
    monkeypatch.setattr(jax, "devices", lambda *_: pytest.fail("no device need be asked"))
    before = sum(array.nbytes for array in jax.live_arrays())
    code, out, _ = shown(tmp_path, "--devices=64", "--config.mesh.fsdp=8", "--config.data.batch_size=64")
    assert code == 0 and "on 64 devices = data 8 x fsdp 8" in out
    assert sum(array.nbytes for array in jax.live_arrays()) == before


def test_devices_that_the_batch_does_not_divide_over_are_an_error_when_asked_for(tmp_path):
    code, _, err = shown(tmp_path, "--devices=64", "--config.mesh.fsdp=8")
    assert code == 2 and "config.data.batch_size=8" in err and "data x fsdp x expert = 64" in err
    code, _, err = shown(tmp_path, "--devices=0")
    assert code == 2 and err.startswith("irope: error: --devices=0:")


def test_a_mesh_without_a_free_axis_says_how_many_devices(tmp_path):
    flags = [f"--config.{name}={value}" for name, value in [("mesh.data", "4"), ("mesh.fsdp", "4")]]
    code, out, _ = shown(tmp_path, *flags, "--config.data.batch_size=16")
    assert code == 0 and "on 16 devices = data 4 x fsdp 4" in out


def test_a_mesh_that_does_not_fit_these_devices_is_told_and_the_rest_is_shown(tmp_path):
    code, out, _ = shown(tmp_path, "--config.mesh.fsdp=3")
    assert code == 0 and "layers" in out
    assert "does not fit 8 devices: config.mesh.data=-1" in out and "--devices=N" in out


def test_a_parameter_that_does_not_divide_names_the_axis_and_a_size_that_would():
    experiment = tiny.experiment(("model.pattern.1.ffn.hidden_dim", "14"), ("mesh.data", "1"), ("mesh.tensor", "2"))
    assert show.layout_lines(experiment, 2)
    experiment = tiny.experiment(
        *[("model.num_heads", "4"), ("model.num_kv_heads", "4"), ("model.pattern.1.ffn.hidden_dim", "14")],
        *[("mesh.data", "1"), ("mesh.tensor", "4")],
    )
    with pytest.raises(ConfigError, match=r"axis 'mlp' of size 14.*layer_1/feed_forward.*use 2") as caught:
        show.layout_lines(experiment, 4)
    assert (caught.value.field, caught.value.value) == ("config.mesh.tensor", 4)


def test_parts_that_follow_one_another_sum_gradients_in_float32():
    plain = [("model.precision.params", "bfloat16")]
    held = lambda *more: dict(
        (name, number(count)) for name, count, *_ in table(show.layout_lines(tiny.experiment(*plain, *more), 1), "held")
    )
    assert held()["gradients"] == held()["parameters"]
    assert held(("train.accumulate", "2"))["gradients"] == 2 * held()["parameters"]


def test_what_each_layer_sends_is_told_where_the_sequence_is_cut():
    """By hand: 4 rows of 32 tokens on a device of a ring of 2; keys of 1 head of 8, float32: 128 bytes a token."""
    lines = show.layout_lines(tiny.experiment(*MESH), 8)
    start = next(i for i, line in enumerate(lines) if line.startswith("attention of 32 tokens over 2 devices"))
    end = next((i for i, line in enumerate(lines) if i > start and not line), len(lines))
    told = [line for line in lines[start + 1 : end] if re.match(r"^ +\d+  ", line)]
    assert [line.split()[1] for line in told] == ["chunked", "global:"]
    assert "halo" in told[0] and "because" in lines[start + 2]  # chunks by document, and documents start anywhere
    sent = 4 * 32 // 2 * (2 * 1 * 8 * 4)
    assert f"{sent / 1000:.1f} kB per layer forward" in told[1]
    aligned = show.layout_lines(tiny.experiment(*MESH, ("data.packing.document_multiple", "8")), 8)
    assert any("chunked 8: local, nothing is sent" in line for line in aligned)
    heads = [("model.num_heads", "4"), ("model.num_kv_heads", "4")]  # 2 and 2 a device: exchanged, each sends half
    exchanged = show.layout_lines(tiny.experiment(*MESH, *heads), 8)[-1]
    sent = 4 * 32 // 2 * (2 * 2 + 2 * 2) * 8 * 4 // 2
    assert f"all-to-all over 2 devices, {sent / 1000:.1f} kB per layer forward, as much backward" in exchanged
    whole = show.layout_lines(tiny.experiment(("mesh.fsdp", "2")), 8)
    assert not any("attention of" in line for line in whole)


def test_help_teaches_it(capsys):
    with pytest.raises(SystemExit):
        cli.main(["show", "--help"])
    text = capsys.readouterr().out
    assert "--devices N" in text and "--devices=64" in text and "bytes on a device" in text


def test_bytes_of_a_model_by_hand(tmp_path):
    """All parameters whole on one device: four bytes each, twice that and a count for Adam."""
    _, out, _ = shown(tmp_path, "--devices=1")
    count = number(re.search(r"^  total +([\d,]+)$", out, re.MULTILINE)[1])
    totals = {name: number(cell) for name, cell, *_ in table(out.splitlines(), "held")}
    assert totals["parameters"] == 4 * count and totals["gradients"] == 4 * count
    assert math.isclose(totals["optimizer state"], 8 * count, abs_tol=16)


@pytest.mark.parametrize(
    ("name", "total", "active", "tensors"),
    [("scout", 107_769_861_120, 17_172_894_720, 579), ("maverick", 400_711_848_960, 17_184_691_200, 507)],
)
def test_the_two_of_llama_4_have_their_sizes(name, total, active, tensors, capfd):
    config = Path(__file__).parent.parent / "configs" / f"llama4_{name}.py"
    assert cli.main(["show", f"--config={config}"]) == 0
    told = {line.split()[0]: line for line in capfd.readouterr().out.splitlines() if line.strip()}
    assert number(told["total"].split()[-1]) == total
    assert number(told["for"].split()[-1]) == active
    assert f"{tensors} tensors, named as in llama4_text" in told["in"]


def test_the_cache_that_is_shown_is_the_one_that_is_made(capsys):
    """Of `--decode`: every byte of a cache of the tiny model on two devices that share the text."""
    experiment = tiny.experiment(("mesh.data", "1"), ("mesh.context", "2"))
    lines = show.cache_lines(experiment, 2, 99)
    with jax.set_mesh(make_mesh(experiment.mesh, jax.devices()[:2])):
        for numbers in ("float32", "bfloat16", "int8", "int4"):
            cache = new_cache(experiment.model, CacheSpec(1, 100, numbers))
            here = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(cache))
            (line,) = (line.split() for line in lines if line.strip().startswith(numbers))
            assert [int(cell.replace(",", "")) for cell in line[-2:]] == [tree_bytes(cache), here]
    near, far = (line.split() for line in lines[2:4])
    assert near[:4] == ["chunked", "8", "1", "8"] and far[:3] == ["global", "1", "100"]
    scout = Path(__file__).parent.parent / "configs" / "llama4_scout.py"
    assert cli.main(["show", f"--config={scout}", "--decode=1048576"]) == 0
    said = capsys.readouterr().out
    assert "1.125 GiB" in said and "48.000 GiB" in said and "49.125 GiB" in said
