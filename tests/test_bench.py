"""Tests of extras/bench.py."""

import re
import sys

import numpy as np
import pytest
import torch
from helpers import run_command, run_python, tiny_model
from torch.utils.flop_counter import FlopCounterMode

from extras import bench, bench_files, world


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_bench_prints_machine_day_and_a_table(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_files, "CACHE", tmp_path)
    done = run_command("bench", "eval", "--quick")
    machine, *lines = done.stdout.splitlines()
    assert re.search(r"torch \S+, .* cores .* load [\d.]+, \d{4}-\d\d-\d\d \d\d:\d\d UTC$", machine)
    columns, rule, *rows = (cells(line) for line in lines if line.startswith("|"))
    assert columns == ["what", "wall s", "CPU s", "peak MB", "over ours from csv"]
    assert set(rule) == {"---"} and [row[0] for row in rows[:2]] == [bench.CSV, bench.ARRAYS]
    assert rows[0][4] == "1 (1-1)" and float(rows[0][2].split()[0]) > 0
    assert "--official PATH" in rows[-1][0] and set(rows[-1][1:]) == {""}


@pytest.mark.slow
@pytest.mark.parametrize("section", bench.SECTIONS)
def test_bench_every_section_runs(section):
    done = run_command("bench", section, "--quick", run=run_python, timeout=600)
    assert done.stdout.count("**") >= 2 and "nan" not in done.stdout


def test_bench_has_a_row_for_a_missing_peer(tmp_path, monkeypatch):
    world.write_video(tmp_path / "clip.mp4", np.zeros((100, 64, 64, 3), np.uint8))
    monkeypatch.setitem(sys.modules, "decord", None)  # an import of it fails
    decoders = {bench.OURS: bench.decode_here, "decord": bench.with_decord}
    monkeypatch.setattr(bench, "DECODERS", decoders)
    ours, decord = bench.decoding_table({"10 s": tmp_path / "clip.mp4"}, rounds=2)[1]
    assert len(ours["10 s, 32x2"]) == 2 and (ours["10 s, 32x2"] > 0).all()
    assert decord["method"].startswith("decord: not installed") and len(decord) == 1


def test_bench_measures_in_turns_and_drops_the_warm_up():
    order = []

    def call(name):
        return lambda: order.append(name) or len(order)

    results = bench.in_turns({"a": call("a"), "b": call("b")}, rounds=3, warmup=1)
    assert "".join(order) == "ba" + "ab" + "ba" + "ab"
    assert {name: list(values) for name, values in results.items()} == {
        "a": [3, 6, 7],
        "b": [4, 5, 8],
    }


def test_bench_prints_medians_and_quartiles():
    assert bench.show(np.array([4.0, 1.0, 3.0, 2.0, 5.0])) == "3 (2-4)"
    assert [bench.show(cell) for cell in (1234.5, 0.12345, "x", np.array([7.0]))] == [
        "1,234",
        "0.123",
        "x",
        "7",
    ]
    assert bench.markdown("T", [{"a": 1.0}, {"b": "x"}]).splitlines() == [
        "**T**",
        "",
        "| a | b |",
        "| --- | --- |",
        "| 1 |  |",
        "|  | x |",
    ]


@pytest.mark.parametrize("cls", [False, True])
def test_bench_counts_the_operations_that_torch_counts(cls):
    """Of the encoder; attention as explicit products, whose backward is twice their forward."""
    net = tiny_model(cls=cls, pool="cls" if cls else "norm-mean").encoder
    video = torch.randn(2, 3, 8, 48, 32)
    with (
        torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
        FlopCounterMode(display=False) as counter,
    ):
        net(video)[0].sum().backward()
    assert bench.flops(net.config, 2) == pytest.approx(counter.get_total_flops(), rel=1e-6)


def test_bench_training_step_trains_what_it_names():
    net = tiny_model()
    before = {name: p.clone() for name, p in net.named_parameters()}
    bench.training_step(net, torch.randn(2, 3, 8, 48, 32))()
    moved = {name for name, p in net.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if not name.startswith("heads.boxes")}


def test_bench_refuses(tmp_path):
    for words, sentence in (
        (["eval", "--official", tmp_path / "none.py"], "none.py: no such file"),
        (["eval", "--rounds", 1], "--rounds: expected 2 or more"),
        (["data", "--gpu-rate", 0], "--gpu-rate: expected more than 0"),
        (["eval", "--lr", 1], "--lr: of a recipe's keys only `bench train` takes"),
    ):
        assert sentence in run_command("bench", *words, code=2).stderr
