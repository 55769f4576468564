"""A job always ends by itself: whatever kills one of its processes, with whatever signal."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import ENVIRONMENT, HERE, run_options, run_python, run_ranks

from cofinetune import Recipe
from extras import checkpoints, launch, run
from extras.job import Job

pytest_plugins = ["helpers"]
LIMIT_SEC = 45
LINUX = pytest.mark.skipif(not os.path.isdir("/proc"), reason="looks at processes through /proc")


def processes_of(folder):
    """pid -> (parent, command line) of the processes that name a folder: of a job."""
    result = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            words = (entry / "cmdline").read_bytes().decode().split("\0")
            state, parent = (entry / "stat").read_text().rsplit(")", 1)[1].split()[:2]
        except OSError:
            continue
        if str(folder) in words and state != "Z":
            result[int(entry.name)] = (int(parent), words)
    return result


def pick(folder, who, launched):
    """The pids of one kind of process, in order."""
    alive = processes_of(folder)
    if launched:
        launcher = [pid for pid, (_, words) in alive.items() if "extras.launch" in words]
    else:
        launcher = []
    ranks = [pid for pid, (parent, _) in alive.items() if parent in launcher]
    if not launched:
        ranks = [pid for pid, (parent, _) in alive.items() if parent not in alive]
    workers = [pid for pid, (parent, _) in alive.items() if parent in ranks]
    return sorted({"launcher": launcher, "rank": ranks, "worker": workers}[who])


def start(tiny_world, out, launched, *more):
    options = run_options(tiny_world, out, "--save-every", 2, "--workers", 2, *more, steps=100_000)
    words = [sys.executable, "cofinetune.py", *options]
    if launched:
        launcher = ["-m", "extras.launch", "--standalone", "--nproc-per-node=2"]
        words = [sys.executable, *launcher, "cofinetune.py", *options]
    output = open(f"{out}.txt", "w")
    process = subprocess.Popen(
        words,
        cwd=HERE,
        env=ENVIRONMENT,
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    until = time.monotonic() + 90
    while not (out / "last.pt").exists():
        assert process.poll() is None and time.monotonic() < until, Path(f"{out}.txt").read_text()
        time.sleep(0.1)
    return process


def ended(process, out):
    """Seconds until nothing of the job is left; the whole output."""
    began = time.monotonic()
    while process.poll() is None or processes_of(out):
        if time.monotonic() - began > LIMIT_SEC:
            left = processes_of(out)
            for pid in left:
                os.kill(pid, signal.SIGKILL)
            pytest.fail(f"after {LIMIT_SEC} s still there: {left}")
        time.sleep(0.1)
    return time.monotonic() - began, Path(f"{out}.txt").read_text()


@LINUX
@pytest.mark.slow
@pytest.mark.parametrize(
    "who, number, launched",
    [
        ("worker", signal.SIGKILL, False),
        ("worker", signal.SIGTERM, False),
        ("rank", signal.SIGKILL, False),
        ("worker", signal.SIGKILL, True),
        ("rank", signal.SIGKILL, True),
        ("rank", signal.SIGSEGV, True),
        ("launcher", signal.SIGKILL, True),
        ("launcher", signal.SIGTERM, True),
        ("launcher", signal.SIGINT, True),
    ],
)
def test_killing_any_process_ends_the_job(tiny_world, tmp_path, who, number, launched):
    out = tmp_path / "run"
    process = start(tiny_world, out, launched)
    os.kill(pick(out, who, launched)[-1], number)
    _, output = ended(process, out)
    assert process.returncode != 0
    assert "Traceback" not in output, output
    if (who, launched) != ("rank", False):  # a killed process says nothing
        last = output.strip().splitlines()[-1]
        assert any(word in last for word in ("killed", "ended by", "gone", "stopped")), output
    assert checkpoints.load(out / "last.pt")["step"] >= 2


@LINUX
def test_a_killed_worker_is_one_sentence(tiny_world, tmp_path):
    out = tmp_path / "run"
    process = start(tiny_world, out, False)
    os.kill(pick(out, "worker", False)[0], signal.SIGKILL)
    _, output = ended(process, out)
    assert process.returncode == 2 and "Traceback" not in output, output
    assert "workers" in output.strip().splitlines()[-1]
    assert checkpoints.load(out / "last.pt")["step"] >= 2


@LINUX
def test_nobody_outlives_a_killed_process(tiny_world, tmp_path):
    out = tmp_path / "run"
    process = start(tiny_world, out, False)
    process.kill()
    ended(process, out)


def test_a_second_run_in_a_folder_says_that_the_first_is_at_work(tiny_world, tmp_path):
    out = tmp_path / "run"
    process = start(tiny_world, out, False)
    done = run_python("cofinetune.py", *run_options(tiny_world, out))
    os.killpg(process.pid, signal.SIGTERM)
    process.wait(60)
    assert done.returncode == 2 and "is at work" in done.stderr, done.stderr


def test_the_sentence_is_the_last_thing_on_the_screen():
    launch = ["-m", "extras.launch", "--standalone", "--nproc-per-node=2"]
    done = run_python(*launch, "cofinetune.py", "--stpes", "3")
    assert done.returncode == 2
    assert done.stderr == "error: train: unknown option --stpes, did you mean --steps?\n"
    done = run_ranks(2)("cofinetune.py", "--stpes", "3")  # torch's own launcher: within its report
    assert "did you mean --steps" in done.stderr.strip().splitlines()[-2]


def test_memory_is_named_only_where_it_may_be_the_cause():
    assert "killed by SIGKILL (the system kills when" in launch.sentence_of_killed(1, 9)
    assert "killed by SIGINT; the same" in launch.sentence_of_killed(1, 2)


def test_steps_before_an_evaluation_count_in_the_progress_line(tmp_path, monkeypatch, capsys):
    """Two steps of 1 s, half of it waiting, an evaluation of 100 s between them."""
    clock = [1000.0]
    monkeypatch.setattr(run.time, "time", lambda: clock[0])
    log = run.Log(tmp_path, Job(), Recipe(steps=2, log_every=1000), 0)
    for step in range(2):
        clock[0] += 1.0
        log.waited_sec = 0.5
        log.step(step, {"own": 1.0}, 0.1, 1.0, 2, {}, {})
        if step == 0:
            clock[0] += 100.0
            log.evaluation(1, {"task": {}})
    assert "2 clips/s  data wait 50%" in capsys.readouterr().out
