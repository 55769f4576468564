"""A job always ends by itself: whatever kills one of its processes, with whatever signal."""

import copy
import errno
import multiprocessing
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import (
    ENVIRONMENT,
    HERE,
    raise_exit,
    run_command,
    run_options,
    run_python,
    run_train,
)
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

import cofinetune
import data
from cofinetune import Recipe
from extras import checkpoints, compare, job, launch, run, workers
from extras import recipe as recipes
from extras.job import Job

pytest_plugins = ["helpers"]
LIMIT_SEC = 45
LAUNCHER = ["-m", "extras.launch", "--standalone", "--nproc-per-node=2"]
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
        words = [sys.executable, *LAUNCHER, "cofinetune.py", *options]
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
        ("rank", signal.SIGTERM, True),
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
def test_a_second_run_is_refused_and_a_killed_worker_is_one_sentence(tiny_world, tmp_path):
    out = tmp_path / "run"
    process = start(tiny_world, out, False)
    with pytest.raises(ValueError, match="run: a run is at work in this folder"):
        run_train(tiny_world, out)
    os.kill(pick(out, "worker", False)[0], signal.SIGKILL)
    _, output = ended(process, out)
    assert process.returncode == 2 and "Traceback" not in output, output
    assert "workers" in output.strip().splitlines()[-1]
    assert checkpoints.load(out / "last.pt")["step"] >= 2


@LINUX
@pytest.mark.parametrize("words", [["cofinetune.py"], ["-m", "extras.launch", "cofinetune.py"]])
def test_ctrl_c_while_torch_is_imported_is_silent(words):
    process = subprocess.Popen(
        [sys.executable, *words, "--steps", "no"],
        cwd=HERE,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    while "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text():
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    assert process.communicate(timeout=60)[0] == b"" and process.returncode == -signal.SIGINT


def test_windows_is_refused_before_anything_fails_to_import():
    words = """if True:
        import os, runpy, sys
        os.name = "nt"
        for name in ("torch", "numpy", "av", "fcntl", "resource"):
            sys.modules[name] = None
        runpy.run_path("cofinetune.py", run_name="__main__")"""
    done = run_python("-c", words)
    sentence = "error: Windows is not supported; its Linux (WSL 2) is\n"
    assert (done.returncode, done.stderr) == (1, sentence)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_the_demo_is_the_same_under_other_ways_to_start_workers(tiny_run, tmp_path, method):
    """macOS starts them by spawn, Python 3.14 by forkserver; the world is made by such workers too.
    Nor is there a sched_getaffinity on macOS."""
    text = f"import multiprocessing, os; multiprocessing.set_start_method({method!r})"
    (tmp_path / "sitecustomize.py").write_text(f"{text}\ndel os.sched_getaffinity\n")
    options = run_options(tmp_path / "world", tmp_path / "run", "--workers", 2, "--preview", 2)
    environment = ENVIRONMENT | {"PYTHONPATH": f"{tmp_path}:{HERE}"}
    run_command(*options, run=run_python, env=environment, timeout=600)
    here, there = (checkpoints.load(out / "last.pt") for out in (tmp_path / "run", tiny_run[0]))
    for key, value in there["model"].items():
        assert torch.equal(value, here["model"][key]), key


def test_macos_as_far_as_code_can_tell(tmp_path, monkeypatch):
    """Its memory is counted in bytes, its tensors travel by name, there is no /dev/shm."""
    used = SimpleNamespace(ru_maxrss=3 * 2**30)
    monkeypatch.setattr("resource.getrusage", lambda who: used)
    monkeypatch.setattr(sys, "platform", "darwin")
    assert run.memory_gib(torch.device("cpu")) == 3.0
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    assert compare.core_count() >= 1
    monkeypatch.setattr(os.path, "isdir", lambda path: False)
    monkeypatch.setattr(os, "statvfs", None)
    strategy = torch.multiprocessing.get_sharing_strategy()
    torch.multiprocessing.set_sharing_strategy("file_system")
    try:
        answers = workers.ahead(2)(torch.ones, range(2, 8), largest=2**60)
        assert [len(answer) for answer in answers] == [2, 3, 4, 5, 6, 7]
    finally:
        torch.multiprocessing.set_sharing_strategy(strategy)


class InterruptedAtItsEnd:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.1)


def interrupt(words):
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(60)


def interrupt_a_wait_for_a_thread(words):
    with ThreadPoolExecutor(1) as pool:
        pool.submit(time.sleep, 60)
        interrupt(words)


def interrupt_within_a_destructor(words):
    InterruptedAtItsEnd()
    time.sleep(60)


def interrupt_twice(words):
    signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGINT))
    signal.setitimer(signal.ITIMER_REAL, 0.1)  # while the first waits for the thread
    interrupt_a_wait_for_a_thread(words)


@pytest.mark.parametrize(
    "main, code, sentence",
    [
        (interrupt, 130, job.STOPPED + "\n"),
        (interrupt_a_wait_for_a_thread, 130, job.STOPPED + "\n"),
        (interrupt_within_a_destructor, 130, job.STOPPED + "\n"),
        (interrupt_twice, -signal.SIGINT, ""),
    ],
)
def test_ctrl_c_within_a_command_is_one_sentence(monkeypatch, capfd, main, code, sentence):
    """Within a second, whatever the command waits for. In a forked copy of this process."""
    monkeypatch.setattr(job, "UNWIND_SEC", 0.5)
    monkeypatch.setattr(sys, "stderr", open(2, "w", closefd=False))
    process = multiprocessing.get_context("fork").Process(target=job.run_and_leave, args=(main, []))
    process._config.pop("tempdir", None)  # it removes its own, not that of this process
    began = time.monotonic()
    process.start()
    process.join()
    assert time.monotonic() - began < 5
    assert process.exitcode == code and capfd.readouterr().err == sentence


@LINUX
@pytest.mark.slow
@pytest.mark.parametrize("launched", [False, True])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_no_traceback_at_any_moment(tiny_world, tmp_path, launched, number):
    """A signal for all processes, as a terminal and a batch system send it."""
    options = run_options(tiny_world, tmp_path / "run", "--workers", 2, steps=100_000)
    words = [sys.executable, *LAUNCHER * launched, "cofinetune.py", *options]
    draw = random.Random(0)
    for _ in range(8):
        with open(tmp_path / "output.txt", "w+") as output:
            process = subprocess.Popen(
                words, cwd=HERE, env=ENVIRONMENT, stdout=output, stderr=output,
                start_new_session=True,
            )  # fmt: skip
            time.sleep(draw.uniform(0.3, 12))  # before it Python itself is not ready
            os.killpg(process.pid, number)
            Path(f"{tmp_path}/run.txt").touch()
            ended(process, tmp_path / "run")
            text = Path(output.name).read_text()
        assert process.returncode != 0 and "Traceback" not in text, text


def test_the_sentence_is_the_last_thing_on_the_screen(tiny_world, tmp_path):
    """Once, though every rank fails by it."""
    (tmp_path / "bad.csv").write_text("video,902,0.1,0.1,0.2,0.2,1\nvideo,902,0.1\n")
    launch = ["-m", "extras.launch", "--standalone", "--nproc-per-node=2", "cofinetune.py"]
    words = run_options(tiny_world, tmp_path / "run", "--task.ava.train", tmp_path / "bad.csv")
    done = run_python(*launch, *words)
    assert done.returncode == 2
    assert re.fullmatch(rf"error: {tmp_path}/bad.csv:2: 3 columns instead of .*\n", done.stderr), (
        done.stderr
    )


def test_torchs_own_launcher_reads_the_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    job.last_words("error: what was wrong")
    failure = ProcessFailure(0, 1, 2, str(tmp_path / "error.json"))
    assert failure.message["message"] == "error: what was wrong" and failure.timestamp > 1.7e9


def test_a_name_that_is_no_text_is_one_sentence():
    with pytest.raises(UnicodeEncodeError) as caught:
        os.fsdecode(b"caf\xe9.mp4").encode()
    assert job.sentence_of(caught.value).startswith("error: 'caf\\udce9.mp4' is no UTF-8 text")


def test_a_closed_screen_and_an_ascii_one(monkeypatch, capfd):
    """`>&-`, and PYTHONIOENCODING=ascii before a class that is called é."""
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", open(2, "w", encoding="ascii", closefd=False))
    monkeypatch.setattr(job, "leave", raise_exit)

    def main(words):
        assert not sys.stdout.isatty()
        print("lost")
        print("é", file=sys.stderr)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit):
        job.run_and_leave(main, [])
    signal.signal(signal.SIGINT, before)
    sys.stderr.flush()
    assert capfd.readouterr().err.startswith("\\xe9\n")


def test_a_recipe_of_a_newer_version_is_named_with_its_file():
    for table, key in ((dict(shiny=1, task=[]), "Recipe's key 'shiny'"), ({}, "'task'")):
        with pytest.raises(ValueError, match=f"last.pt: its recipe is not .* version.*{key}"):
            checkpoints.recipe_of({"recipe": table, "path": "last.pt"}, Recipe)


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path, monkeypatch):
    checkpoints.save(tmp_path / "last.pt", {"step": 1})

    def full(state, file):
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0")

    def unknown(number):
        raise OSError(errno.EINVAL, "Invalid argument")

    with monkeypatch.context() as patch:  # a disk of a network that cannot sync a folder
        patch.setattr(checkpoints.os, "fsync", lambda number: None)
        checkpoints.sync_folder(tmp_path)
        patch.setattr(checkpoints.os, "fsync", unknown)
        checkpoints.sync_folder(tmp_path)
    monkeypatch.setattr(checkpoints.torch, "save", full)
    with pytest.raises(OSError, match="no space left on the disk.*; the one before it is intact"):
        checkpoints.save(tmp_path / "last.pt", {"step": 2})
    assert [path.name for path in tmp_path.iterdir()] == ["last.pt"]


def test_memory_is_named_only_where_it_may_be_the_cause():
    assert "killed by SIGKILL (the system kills when" in launch.sentence_of_end(1, -9)
    assert "killed by SIGINT; the same" in launch.sentence_of_end(1, -2)
    assert "rank 1 was stopped by SIGTERM; the same" in launch.sentence_of_end(1, 128 + 15)
    for status in (1, 3, 128, 255, -127):  # no signals
        assert launch.sentence_of_end(0, status) == f"rank 0 ended with status {status}"


def test_a_refusal_to_resume_names_what_changed_in_the_data():
    saved = {"draws": 2, "tasks": {"a": {"items": 5, "fingerprint": 1, "batch": 2}}}

    def now(**changes):
        return saved | {"tasks": {"a": saved["tasks"]["a"] | changes}}

    def said(state):
        return "; ".join(run.data_differences(state, saved))

    assert said(now(batch=4)) == ""  # the recipe's differences say it
    assert said(now(items=6, fingerprint=2)) == "task.a: 6 training items (checkpoint: 5)"
    assert said(now(fingerprint=2)).startswith("task.a: other training items")
    assert said(saved | {"draws": 3}).startswith("the version of this program")


def test_annotations_that_change_during_a_run_are_not_scored(tmp_path):
    (tmp_path / "val.csv").write_text("a,1,0,0,1,1,1,0\n")
    task = data.Task("t", "box", train="t.csv", val="val.csv", flip=0.0)
    one = run.Run.__new__(run.Run)
    one.recipe = Recipe(root=str(tmp_path), task=[task])
    one.truth = run.truth_of(one.recipe)
    (tmp_path / "val.csv").touch()
    assert run.truth_of(one.recipe) == one.truth
    (tmp_path / "val.csv").write_text("a,1,0,0,1,1,2,0\n")
    with pytest.raises(ValueError, match="val.csv was changed since the run began"):
        one.record_evaluation(3, {})


def test_steps_before_an_evaluation_count_in_the_progress_line(tmp_path, monkeypatch, capsys):
    """Two steps of 1 s, half of it waiting, an evaluation of 100 s between them."""
    clock = [1000.0]
    monkeypatch.setattr(run.time, "monotonic", lambda: clock[0])
    log = run.Log(tmp_path, Job(), Recipe(steps=2, log_every=1000), 0)
    for step in range(2):
        clock[0] += 1.0
        log.waited_sec = 0.5
        log.step(step, {"own": 1.0}, 0.1, 1.0, 2, {}, {})
        if step == 0:
            clock[0] += 100.0
            log.evaluation(1, {"task": {}})
    assert "2 clips/s  data wait 50%" in capsys.readouterr().out


def open_in_rank(recipe, rank, local, port, results):
    """What open_tasks opened and returned in one of two processes, or the error."""
    os.environ |= dict(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(local))
    os.environ |= dict(MASTER_ADDR="localhost", MASTER_PORT=str(port))
    opened, open_task = [], data.open_task
    data.open_task = lambda task, *rest: opened.append(task.name) or open_task(task, *rest)
    try:
        sets = cofinetune.open_tasks(recipe, job.join(recipe))
        found = []
        for name, dataset in [pair for part in sets for pair in part.items()]:
            items = dataset.items.fingerprint(), dataset.items[0].path
            found.append((name, dataset.split, dataset.classes, dataset.report, items))
    except ValueError as error:
        found = str(error)
    results.put((rank, opened, found))


def test_machines_with_other_data_are_refused(tiny_world, tmp_path):
    """What else would happen: batches of different clips, and a gradient that nobody can repeat."""
    words = dict(root=str(tiny_world), world="{}", out=str(tmp_path), device="cpu")
    recipe = recipes.read(Recipe, "demo", words)
    sets, _ = cofinetune.open_tasks(recipe, Job())
    stream = data.Stream(sets, steps=recipe.steps)
    other = copy.deepcopy(stream.state())

    class Pair(Job):
        def everywhere(self, part):
            return [part, (0, other)]

    for lock in run.Run(recipe, Pair(), stream, sets).locks:
        lock.close()
    other["tasks"]["ava"]["items"] -= 1
    other["tasks"]["actions"]["fingerprint"] += 1
    items = len(sets["ava"])
    message = (
        "rank 0 and rank 1 find different data: task.actions: other training items, or their "
        rf"annotations changed; task.ava: {items} training items \(rank 1: {items - 1}\)"
    )
    with pytest.raises(ValueError, match=message):
        run.Run(recipe, Pair(), stream, sets)


@pytest.mark.parametrize("locals_, broken", [((0, 1), False), ((0, 1), True), ((0, 0), False)])
def test_one_rank_of_a_machine_reads_the_lists(tiny_world, tmp_path, locals_, broken):
    """Two machines of a rank each: each reads, since a machine may have a disk of its own."""
    words = dict(root=str(tiny_world), world="{}", device="cpu", threads="1")
    if broken:
        (tmp_path / "bad.csv").write_text("video,902,0.1\n")
        words["task.ava.train"] = str(tmp_path / "bad.csv")
    recipe = recipes.read(Recipe, "demo", words)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    fork = multiprocessing.get_context("fork")  # nothing is imported anew
    results = fork.Queue()
    for rank, local in enumerate(locals_):
        fork.Process(target=open_in_rank, args=(recipe, rank, local, port, results)).start()
    (_, opened, found), (_, others, same) = sorted(results.get(timeout=60) for _ in locals_)
    assert found == same
    if broken:
        assert (
            found.startswith(f"{tmp_path}/bad.csv:1: 3 columns instead of") and opened[-1] == "ava"
        )
    else:
        assert sorted(opened) == sorted(2 * ["actions", "templates", "ava"]) and len(found) == 6
    assert others == ([] if locals_[1] else opened)
