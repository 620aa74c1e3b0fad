"""Committed experiments: their reports are what their scripts make of their numbers."""

import importlib.util
import json
import math
import shutil
from pathlib import Path

EXPERIMENTS = Path(__file__).parent.parent / "experiments"


def script(path: Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_report_of_rope_extension_is_made_of_its_results(tmp_path, monkeypatch):
    folder = EXPERIMENTS / "rope_extension"
    shutil.copyfile(folder / "results.jsonl", tmp_path / "results.jsonl")
    extend = script(folder / "extend.py")
    monkeypatch.setattr(extend, "HERE", tmp_path)
    monkeypatch.setattr(extend, "RESULTS", tmp_path / "results.jsonl")
    extend.report()
    made = (tmp_path / "report.md").read_text()
    assert made == (folder / "report.md").read_text()
    rows = {row["method"]: row for row in map(json.loads, (tmp_path / "results.jsonl").read_text().splitlines())}
    assert set(rows) == set(extend.NAMES)
    for method, row in rows.items():
        cells = [f"{math.exp(bucket['nll']):.1f}" for bucket in row["buckets"]]
        assert f"| {extend.NAMES[method]} | {' | '.join(cells)} |" in made
    assert (tmp_path / "perplexity_x2.png").stat().st_size > 10_000
