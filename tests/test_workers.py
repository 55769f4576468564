"""Tests of extras/workers.py."""

import faulthandler
import multiprocessing.util
import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from helpers import ENVIRONMENT, HERE, data_batches, data_stream, data_tasks

import data
from extras import workers
from extras.workers import ahead

pytest_plugins = ["helpers"]  # its fixtures


def square(number):
    return torch.tensor(number * number)


def feed(count):
    """Endless answers, the first of which is here; the processes that make them."""
    answers = ahead(count)(square, range(10**9))
    assert next(answers) == 0
    return answers, multiprocessing.active_children()


def test_any_function_of_any_requests_in_their_order():
    """Also where there are more workers than requests, or none, and where one is slow."""

    def make(request):
        time.sleep(0.2 * (request == 0))
        return {"request": request, "tensor": torch.full((3,), request)}

    for count, requests in ((0, range(3)), (1, range(5)), (3, range(8)), (3, range(2)), (2, ())):
        answers = list(ahead(count)(make, iter(requests)))
        assert [answer["request"] for answer in answers] == list(requests)
        for answer in answers:
            assert answer["tensor"].tolist() == [answer["request"]] * 3
    assert not multiprocessing.active_children()


class Pinnable(list):
    """Its tensor is said to be pinned by the thread that does it."""

    def pin_memory(self):
        return [*self, threading.current_thread().name]


@pytest.mark.parametrize("count", [0, 2])
def test_a_thread_pins_answers_for_a_gpu(count, monkeypatch):
    """In order; what cannot be pinned comes as it is; the thread ends with the loop."""
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    devices = []
    monkeypatch.setattr(torch.cuda, "set_device", devices.append)
    answers = list(ahead(count)(lambda number: Pinnable([number]), range(5)))
    assert [number for number, _ in answers] == [0, 1, 2, 3, 4]
    assert all(name.startswith("pin") for _, name in answers) and devices == [3]
    assert list(ahead(count)(lambda number: number or None, range(3))) == [None, 1, 2]
    endless = ahead(count)(lambda number: number, range(10**9))
    assert next(endless) == 0
    endless.close()
    assert not multiprocessing.active_children()


def test_tensors_of_any_size_and_kind_arrive_as_they_were():
    def make(number):
        generator = torch.Generator().manual_seed(number)
        big = torch.randn(3 * workers.SMALL_BYTES // 4, generator=generator)
        return [
            big,
            big[7:11],
            big[:8].view(2, 4).t(),
            torch.zeros(0, 4),
            torch.tensor(number),
            big[:6] > 0,
            big[:6].bfloat16(),
        ]

    for number, answer in enumerate(ahead(1)(make, range(5))):
        for got, expected in zip(answer, make(number), strict=True):
            assert got.dtype == expected.dtype and torch.equal(got, expected)
        assert answer[0].is_shared() and not answer[1].is_shared()
        answer[1] += 1  # may be written to


@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGBUS, signal.SIGHUP, signal.SIGTERM])
def test_a_lost_worker_is_one_sentence(kill, monkeypatch):
    """At once, whatever it was doing; the other workers leave with it."""
    monkeypatch.setattr(workers, "GRACE_SEC", 1)
    faulthandler.disable()  # pytest's, which the worker would inherit
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it would be ignored
    answers, processes = feed(2)
    signal.signal(signal.SIGHUP, before)
    os.kill(processes[0].pid, kill)
    began = time.monotonic()
    message = {signal.SIGKILL: "memory ran out", signal.SIGBUS: "/dev/shm"}.get(kill, kill.name)
    with pytest.raises(workers.WorkerLost, match=f"{kill.name}.*{message}|{message}"):
        for _ in answers:
            assert time.monotonic() - began < 20
    assert not any(process.is_alive() for process in processes)


def test_an_answer_that_cannot_be_taken_is_told_with_its_reason(monkeypatch):
    """Its worker lives: whoever tidies /tmp took the folder of its socket."""
    monkeypatch.setattr(workers, "EXIT_SEC", 0.1)
    monkeypatch.setattr(workers, "SMALL_BYTES", 0)
    folder = multiprocessing.util.get_temp_dir()
    answers, processes = feed(1)
    os.rename(folder, folder + "-away")
    try:
        with pytest.raises(workers.WorkerLost, match="could not be taken: FileNotFoundError"):
            for _ in answers:
                pass
    finally:
        os.rename(folder + "-away", folder)
    assert not any(process.is_alive() for process in processes)


def test_workers_outlast_ctrl_c_and_end_with_the_loop():
    answers, processes = feed(2)
    for process in processes:  # a batch system's SIGTERM, a terminal's SIGINT reach all processes
        os.kill(process.pid, signal.SIGTERM)
        os.kill(process.pid, signal.SIGINT)
    for number in range(1, 9):
        assert next(answers) == number * number
    answers.close()
    assert not any(process.is_alive() for process in processes)


ORPHANS = """
import multiprocessing, os, signal, torch, workers
def square(number):
    return torch.tensor(number * number)
answers = workers.ahead(2)(square, range(10**9))
assert [int(next(answers)) for _ in range(3)] == [0, 1, 4]
print(*(process.pid for process in multiprocessing.active_children()), flush=True)
{end}
"""


@pytest.mark.parametrize(
    "end",
    [
        "os.kill(os.getpid(), signal.SIGKILL)",
        "",
        pytest.param("raise KeyError", marks=pytest.mark.slow),
        pytest.param("os._exit(3)", marks=pytest.mark.slow),
    ],
)
def test_workers_do_not_outlive_their_process(end, tmp_path):
    """The file alone, in an empty folder, in a loop of one's own."""
    shutil.copy(HERE / "extras/workers.py", tmp_path)
    environment = {key: value for key, value in ENVIRONMENT.items() if key != "PYTHONPATH"}
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", ORPHANS.format(end=end)],
        capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=60,
    )  # fmt: skip
    pids = list(map(int, done.stdout.split()))
    assert len(pids) == 2
    while any(os.path.exists(f"/proc/{pid}") for pid in pids):
        time.sleep(0.1)
        assert time.monotonic() - began < 60


@pytest.mark.skipif(not os.path.isdir("/dev/shm"), reason="no /dev/shm here")
def test_too_little_shared_memory_is_said_before_the_first_answer(data_folder, monkeypatch):
    batch = 4 * 4 * 32 * 32 * 3  # bytes; 2 workers hold two each, the loop one

    class Room:
        f_bavail, f_frsize = 0, 1

    monkeypatch.setattr(os, "statvfs", lambda path: Room)

    def batches(**options):
        stream = data_stream(data_folder)
        return data.training_batches(stream, 0, 2, work=ahead(2), **options)

    Room.f_bavail = 5 * batch
    assert len(list(batches())) == 2
    Room.f_bavail -= 1
    with pytest.raises(workers.WorkerLost, match="/dev/shm has 0 MB free, but 2 .*--shm-size"):
        next(batches())
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    Room.f_bavail = 3 * 5 * batch - 1  # for three processes like this one
    with pytest.raises(workers.WorkerLost, match="/dev/shm has 1 MB free"):
        next(batches())
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    Room.f_bavail = 6 * batch // 2 - 1  # halves, of which the loop keeps two
    with pytest.raises(workers.WorkerLost, match="/dev/shm"):
        next(batches(micro=2))
    Room.f_bavail += 1
    assert len(next(batches(micro=2))) == 2
    for views, needed in (([1, 1], 4), ([3, 3], 9)):  # items of 9 clips each, at least one
        clips, _ = data_tasks(views=views)
        dataset = data.open_task(clips, data_folder, "val")
        Room.f_bavail = 3 * needed * batch // 4  # a worker holds two, the loop one
        next(data.evaluation_batches(dataset, 4, work=ahead(1)))
        Room.f_bavail -= 1
        with pytest.raises(workers.WorkerLost, match="/dev/shm"):
            next(data.evaluation_batches(dataset, 4, work=ahead(1)))


def test_an_answer_that_finds_no_room_is_one_sentence(data_folder, monkeypatch):
    """Later than the check: the worker can still say it, nothing waits."""

    def no_room(storage, *rest, **more):
        raise RuntimeError("unable to allocate shared memory(shm): No space left on device (28)")

    monkeypatch.setattr(torch.UntypedStorage, "_share_fd_cpu_", no_room)  # the workers inherit it
    monkeypatch.setattr(workers, "SMALL_BYTES", 0)
    with pytest.raises(workers.WorkerLost, match="/dev/shm is full.*--shm-size"):
        data_batches(data_stream(data_folder), 0, 2, workers=2)


def test_an_error_comes_with_its_traceback():
    with pytest.raises(RuntimeError, match="in a worker process(?s:.*)ZeroDivisionError"):
        list(ahead(1)(lambda request: 1 / request, [1, 0]))
