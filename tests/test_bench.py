"""Tests of bench.py."""

import json
import subprocess
import sys

import numpy as np

from extras import bench, world


def test_bench_prints_and_writes_the_same_rows(tmp_path):
    command = [sys.executable, bench.__file__, "eval", "--quick", "--json", tmp_path / "eval.json"]
    printed = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
        env={"TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1"},
    ).stdout
    report = json.loads((tmp_path / "eval.json").read_text())
    assert printed.startswith(report["environment"]) and "load" in report["environment"]
    (table,) = report["tables"]
    lines = [line for line in printed.splitlines() if line.startswith("| ")]
    columns, rule, *rows = ([cell.strip() for cell in line.split("|")[1:-1]] for line in lines)
    assert set(rule) == {"---"} and columns[:2] == ["rows", "what"]
    assert [row[1] for row in rows] == [row["what"] for row in table["rows"]]
    for row, found in zip(rows, table["rows"]):
        for column, cell in zip(columns, row):
            value = found.get(column, "")
            assert cell == bench.show(np.array(value) if isinstance(value, list) else value)
    assert "not installed" in rows[-1][1] and set(rows[-1][2:]) == {""}


def test_bench_has_a_row_for_a_missing_peer(tmp_path, monkeypatch):
    world.write_video(tmp_path / "clip.mp4", np.zeros((80, 64, 64, 3), np.uint8))
    monkeypatch.setitem(sys.modules, "decord", None)  # an import of it fails
    monkeypatch.setattr(bench, "METHODS", {"here": bench.decode, "decord": bench.with_decord})
    here, decord = bench.decoding_table({"a film": (tmp_path / "clip.mp4", 5)}, rounds=2)[1]
    assert len(here["a film, 32x2"]) == 2 and (here["a film, 32x2"] > 0).all()
    assert decord["method"].startswith("decord: not installed") and len(decord) == 1
