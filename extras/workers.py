"""What a loop wants next, made ahead of its use by worker processes.

Copied alone it needs torch. `make` is any function of a request:

    work = ahead(2)                          # two worker processes; 0: none
    for answer in work(make, requests):      # make(request) of each request, in their order

    data.training_batches(stream, 0, 1000, work=ahead(2))

Large tensors of the answers travel through shared memory (/dev/shm), all else through pipes.
"""

import atexit
import contextlib
import functools
import multiprocessing.util
import os
import signal
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.reduction import ForkingPickler

import torch
from torch.multiprocessing.reductions import reduce_tensor

AHEAD = 2  # answers that each worker makes ahead of their use
SMALL_BYTES = 2**16  # of a tensor that a pipe takes without waiting for its reader
EXIT_SEC = 5  # from the end of a worker's pipe to its exit status
GRACE_SEC = 20  # that a worker still serves after SIGINT or SIGTERM
FOR_ALL = (signal.SIGINT, signal.SIGTERM)  # signals that reach all processes of a job
SHM_ADVICE = "give more (docker run --shm-size=8g), take fewer `workers`, or none (workers = 0)"


class WorkerLost(OSError):
    """A worker process ended or found no room for its answer; one sentence says what to do."""


class Problem(str):
    """What a worker sends instead of an answer: the traceback of an error."""


def ahead(workers: int) -> Callable[..., Iterator]:
    """What works off requests by that many processes, started at the first of them; 0: in this one.

    It takes (make, requests, largest=0, kept=1): the largest answer has so many bytes, and the loop
    keeps so many of them at once. WorkerLost, before the first answer if there is no room for them.
    """
    return functools.partial(_answers, workers)


def _answers(
    workers: int, make: Callable, requests: Iterable, largest: int = 0, kept: int = 1
) -> Iterator:
    pool = None
    if workers:
        _check_shared_memory(workers, largest * (AHEAD * workers + kept))
        pool = Pool(make, workers)
    answers = pool.answers(requests) if pool else map(make, requests)
    try:
        yield from _pin_ahead(answers, pool) if torch.cuda.is_initialized() else answers
    finally:
        if pool:
            pool.end()


def _pin_ahead(answers: Iterator, pool: "Pool | None") -> Iterator:
    """Towards a GPU a thread pins each answer that can be (its method pin_memory), one ahead of its
    use."""
    end = object()

    def next_pinned():
        answer = next(answers, end)
        return answer.pin_memory() if hasattr(answer, "pin_memory") else answer

    device = torch.cuda.current_device()  # a thread begins at 0, and would fill that GPU
    with ThreadPoolExecutor(1, "pin", torch.cuda.set_device, (device,)) as thread:
        try:
            coming = thread.submit(next_pinned)
            while (answer := coming.result()) is not end:
                coming = thread.submit(next_pinned)
                yield answer
        finally:
            if pool:
                pool.end()  # the thread may be waiting for a worker


class Pool:
    """Worker processes, each behind a pipe of its own.

    Worker k answers requests k, k + W, ..., so answers are in order however long one takes. Why no
    torch DataLoader: its workers share one pipe and send from a thread; one that is killed, or has
    no room in /dev/shm, leaves it waiting for ever (pytorch#5040). Here a pipe ends with its
    worker, and a worker with the process that started it.
    """

    def __init__(self, make: Callable, workers: int):
        self.pipes, self.processes = [], []
        # Before multiprocessing's own exit, which would wait for workers that have work to do.
        atexit.register(self.end)
        # Where tensors' file descriptors are asked for: one folder, removed by this process.
        multiprocessing.util.get_temp_dir()
        # A worker inherits that these wait: where it is no fork it imports for seconds first.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, FOR_ALL)
        for _ in range(workers):
            ours, theirs = multiprocessing.Pipe()
            process = multiprocessing.Process(target=_serve, args=(make, theirs), daemon=True)
            process.start()
            theirs.close()  # only the worker holds this end
            self.pipes.append(ours)
            self.processes.append(process)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def answers(self, requests: Iterable) -> Iterator:
        at_work = deque()
        for number, request in enumerate(requests):
            if len(at_work) == AHEAD * len(self.pipes):
                yield self.receive(at_work.popleft())
            worker = number % len(self.pipes)
            with contextlib.suppress(OSError):  # a worker that is gone is noticed in `receive`
                self.pipes[worker].send(request)
            at_work.append(worker)
        while at_work:
            yield self.receive(at_work.popleft())

    def receive(self, worker: int):
        try:
            answer = self.pipes[worker].recv()
        except (EOFError, OSError) as error:
            raise WorkerLost(self._what_ended(self.processes[worker], error)) from None
        if not isinstance(answer, Problem):
            return answer
        if "No space left on device" in answer:
            raise WorkerLost(
                f"/dev/shm is full: the worker processes hand over batches there; {SHM_ADVICE}"
            )
        raise RuntimeError(f"in a worker process:\n{answer}")

    def _what_ended(self, process: multiprocessing.Process, error: Exception) -> str:
        process.join(EXIT_SEC)
        code = process.exitcode
        if code is None:  # it lives: too many open files, its folder of sockets was removed
            return f"an answer of a worker process could not be taken: {error!r}"
        how = f"ended with exit code {code}"
        if code < 0:
            # GRACE_SEC after a signal that was for it alone a worker ends itself by an alarm.
            number = signal.SIGTERM if code == -signal.SIGALRM else -code
            how = f"was ended by {signal.Signals(number).name}"
        if code == -signal.SIGKILL:
            how += ", by the system if memory ran out: take fewer `workers`"
        elif code == -signal.SIGBUS:
            how += f", as when /dev/shm is full: {SHM_ADVICE}"
        return f"a worker process {how} ({len(self.processes)} workers)"

    def end(self) -> None:
        atexit.unregister(self.end)
        for process in self.processes:
            process.kill()  # they hold nothing that must be saved, and may be decoding
        for process, pipe in zip(self.processes, self.pipes, strict=True):
            process.join()
            pipe.close()


def _serve(make: Callable, pipe) -> None:
    """The life of a worker."""
    torch.set_num_threads(1)
    ForkingPickler.register(torch.Tensor, _reduce)
    sys.excepthook = lambda *_: None  # errors go through the pipe; threads' last words are noise
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    # Ctrl-C and a batch system's SIGTERM reach all processes. What follows is the training
    # process's affair, which may need some more answers to its next stop.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    for number in FOR_ALL:
        signal.signal(number, lambda *_: signal.alarm(GRACE_SEC))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, FOR_ALL)
    while True:
        try:
            # Large tensors are in shared memory before the first byte leaves: where there is no
            # room, the error can still be told.
            pipe.send(make(pipe.recv()))
        except EOFError:
            return
        except Exception:
            pipe.send(Problem(traceback.format_exc()))


def _reduce(tensor: torch.Tensor) -> tuple:
    """How a tensor is pickled: a small one by value. One in shared memory costs the loop half a
    millisecond, for the socket on which it asks for the file descriptor."""
    if tensor.nbytes <= SMALL_BYTES and tensor.dtype != torch.bfloat16:
        return torch.from_numpy, (tensor.numpy(),)
    return reduce_tensor(tensor)


def _end_with(parent: int) -> None:
    """End this process when its parent is gone, whatever it waits for."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _check_shared_memory(workers: int, most: int) -> None:
    if not os.path.isdir("/dev/shm"):
        return
    room = os.statvfs("/dev/shm")
    free = room.f_bavail * room.f_frsize
    needed = most * int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # torchrun's: ranks of this machine
    if needed > free:
        raise WorkerLost(
            f"/dev/shm has {free / 2**20:.0f} MB free, but {workers} worker processes hand over "
            f"up to {needed / 2**20:.0f} MB there: {SHM_ADVICE}"
        )
