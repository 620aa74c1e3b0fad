"""Committed experiments: their reports are what their scripts make of their numbers."""

import importlib.util
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest

from irope_jax.sweep_cells import load_study, work_of

EXPERIMENTS = Path(__file__).parent.parent / "experiments"


def script(path: Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def made_again(tmp_path, monkeypatch, request):
    """The script of an experiment, and the report that it makes of the committed results."""
    folder, name = EXPERIMENTS / request.param[0], request.param[1]
    shutil.copyfile(folder / "results.jsonl", tmp_path / "results.jsonl")
    module = script(folder / name)
    monkeypatch.setattr(module, "HERE", tmp_path)
    monkeypatch.setattr(module, "RESULTS", tmp_path / "results.jsonl")
    module.report()
    return module, folder


@pytest.mark.parametrize(
    "made_again, picture",
    [(("rope_extension", "extend.py"), "perplexity_x2.png"), (("gaussian_spans", "spans.py"), "divergence.png")],
    indirect=["made_again"],
)
def test_a_report_is_made_of_its_results(made_again, picture, tmp_path):
    _, folder = made_again
    assert (tmp_path / "report.md").read_text() == (folder / "report.md").read_text()
    assert (tmp_path / picture).stat().st_size > 10_000


@pytest.mark.parametrize("made_again", [("rope_extension", "extend.py")], indirect=True)
def test_rope_extension_s_table_holds_every_method(made_again, tmp_path):
    extend, _ = made_again
    made = (tmp_path / "report.md").read_text()
    rows = {row["method"]: row for row in map(json.loads, (tmp_path / "results.jsonl").read_text().splitlines())}
    assert set(rows) == set(extend.NAMES)
    for method, row in rows.items():
        cells = [f"{math.exp(bucket['nll']):.1f}" for bucket in row["buckets"]]
        assert f"| {extend.NAMES[method]} | {' | '.join(cells)} |" in made


def test_a_span_is_the_mean_of_its_tokens_where_its_way_says():
    spans = script(EXPERIMENTS / "gaussian_spans" / "spans.py")
    tokens = np.arange(512, dtype=np.int32)[None] % 7
    table = np.eye(7, 4, dtype=np.float32)
    longer, ids, info = spans.entries("gaussian", 8, tokens, table)
    assert ids.shape == (1, 4 + 48 + 124) and longer.shape == (7 + 48, 4)
    np.testing.assert_allclose(longer[ids[0, 4]], table[tokens[0, 4:12]].mean(axis=0))
    assert (info.positions[0, 4], info.offsets[0, 4]) == (7, 0.5)  # the centre of 4 … 11
    assert math.isclose(info.spreads[0, 4], (63 / 12) ** 0.5, rel_tol=1e-6) and info.spreads[0, 0] == 0
    assert spans.entries("centre", 8, tokens, table)[2].spreads is None
    _, ids, info = spans.entries("copies", 8, tokens, table)
    assert ids.shape == (1, 512) and ids[0, 4] == ids[0, 11] == 7 and list(info.positions[0]) == list(range(512))
    _, ids, info = spans.entries("nothing", 8, tokens, table)
    assert list(info.positions[0]) == [0, 1, 2, 3, *range(388, 512)]
    _, ids, info = spans.entries("middle", 8, tokens, table)
    assert (ids[0, 4], info.positions[0, 4]) == (tokens[0, 8], 8)


GRIDS = [(grid.parent.name, None) for grid in sorted(EXPERIMENTS.glob("*/grid.py"))]


@pytest.mark.parametrize("name, scale", [*GRIDS, ("what_irope_buys", "smoke"), ("what_irope_buys", "large")])
def test_every_cell_of_a_grid_resolves(name, scale):
    study = load_study(EXPERIMENTS / name, scale)
    assert study.question and study.prediction and len(study.cells) > 0
    for cell in study.cells:
        if cell.seed in ("", "seed=0"):
            work_of(cell, EXPERIMENTS / name, Path("runs") / study.name, study)


def test_a_larger_scale_stretches_every_number_of_tokens():
    folder = EXPERIMENTS / "what_irope_buys"
    of = lambda study, arm: work_of(study.cell(f"{arm}/seed=0"), folder, Path("runs/s"), study).experiment
    studies = [load_study(folder, scale) for scale in ("laptop", "large")]
    small, large = (of(study, "iRoPE") for study in studies)
    assert (small.data.seq_len, large.data.seq_len) == (128, 8192)
    chunks = [layer.mask.size for layer in large.model.pattern[:3]]
    assert chunks == [64 * layer.mask.size for layer in small.model.pattern[:3]]
    last = large.model.pattern[3].temperature
    assert last.floor_scale == 8192 and math.isclose(last.attn_scale, 2 / math.log(8192))
    near, far = (of(study, "randomised_positions").data.positions.limit for study in studies)
    assert far == 64 * near
    assert large.evals[0].lengths == tuple(64 * n for n in small.evals[0].lengths)
