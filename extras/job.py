"""The processes of a run: a job with ranks, and how each of them leaves it.

A job always ends by itself. Whatever kills one of its processes, the others notice (a closed
connection, a lost parent), say one sentence and leave within seconds, without waiting for loader
workers or peers that will never answer: see `watch_launcher`, `leave`, and `errors_of_peers`.
"""

import contextlib
import io
import json
import multiprocessing.util
import os
import shutil
import signal
import sys
import threading
import time
import traceback
from dataclasses import dataclass

import torch
import torch.distributed as dist

from data import DecodeError
from extras.launch import LAUNCHER
from extras.workers import WorkerLost

GRACE_SEC = 20  # for the step in progress after SIGTERM; torchrun kills 30 s after it
UNWIND_SEC = 3  # from Ctrl-C within a command to its end, whatever it waits for

STOPPED = "stopped; the same command goes on or starts again"
PEER_LOST = (
    "another process of the job is gone (killed, by the system if memory ran out, or stopped by an "
    "error of its own); the same command goes on from the last checkpoint"
)


class PeerLost(Exception):
    """Another process of the job is gone."""


@dataclass
class Job:
    """This process among those of the run. One process takes the same path, without exchange."""

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")
    machine: dist.ProcessGroup | None = None  # the ranks of this machine, where there are several

    @property
    def first(self) -> bool:
        """Does this rank write files and speak?"""
        return self.rank == 0

    def say(self, *words, end: str = "\n") -> None:
        if self.first:
            print(*words, end=end, flush=True)

    def sum(self, values: list[float]) -> list[float]:
        """Elementwise, over the ranks; through the CPU, so that it does not wait for the GPU's
        queue. Every rank waits for it, so it is the barrier as well."""
        if self.size == 1:
            return values
        total = torch.tensor(values, dtype=torch.float64)
        with errors_of_peers():
            dist.all_reduce(total)
        return total.tolist()

    def barrier(self) -> None:
        self.sum([0.0])

    def gather(self, part) -> list:
        """The parts of all ranks, on rank 0; [] on the others."""
        if self.size == 1:
            return [part]
        parts = [None] * self.size if self.first else None
        with errors_of_peers():
            dist.gather_object(part, parts)
        return parts or []

    def everywhere(self, part) -> list:
        """The parts of all ranks, on every rank."""
        if self.size == 1:
            return [part]
        parts = [None] * self.size
        with errors_of_peers():
            dist.all_gather_object(parts, part)
        return parts

    def read_once(self, read, *arguments):
        """What `read(*arguments)` returns or raises (ValueError, OSError), on every rank: the first
        rank of each machine reads and sends it to the others there, which open no file.

        Of each machine, not of the job: machines may have disks of their own, and what is missing
        on one is to stop the job now. Unpickled is nothing but what this job's code has made.
        """
        if self.size == 1:
            return read(*arguments)
        outcome = None, None
        if self.machine.rank() == 0:
            try:
                outcome = read(*arguments), None
            except (ValueError, OSError) as error:
                outcome = None, error
        sent = [outcome]
        with errors_of_peers():
            dist.broadcast_object_list(sent, group_src=0, group=self.machine)
        result, error = sent[0]
        if error is not None:
            raise error
        return result


@contextlib.contextmanager
def errors_of_peers():
    """A collective call that fails because a peer is gone: PeerLost, in one sentence."""
    try:
        yield
    except RuntimeError as error:
        if lost_peer(error):
            raise PeerLost(PEER_LOST) from error
        raise


def lost_peer(error: RuntimeError) -> bool:
    """Is this gloo's or NCCL's way to say that a connection broke?"""
    words = ("gloo", "NCCL", "Connection closed", "Connection reset", "Broken pipe", "Socket")
    return any(word in str(error) for word in words)


def join(recipe) -> Job:
    """Join the job that torchrun describes in the environment; a plain `python` is a job of one."""
    if recipe.threads:
        torch.set_num_threads(recipe.threads)
    cuda = recipe.device == "cuda" or recipe.device == "auto" and torch.cuda.is_available()
    if cuda and not torch.cuda.is_available():
        raise ValueError("device = cuda, but torch finds no GPU here; --device cpu works anywhere")
    rank = int(os.environ.get("RANK", 0))
    local = int(os.environ.get("LOCAL_RANK", 0))
    size = int(os.environ.get("WORLD_SIZE", 1))
    if cuda and local >= torch.cuda.device_count():
        raise ValueError(
            f"process {local} of this machine has no GPU of its own, torch finds "
            f"{torch.cuda.device_count()}: GPUS=... ./train_ddp.sh, or --device cpu"
        )
    if cuda:
        torch.cuda.set_device(local)
        torch.set_float32_matmul_precision("high")
    if launched():
        watch_launcher()
    job = Job(rank, size, torch.device("cuda", local) if cuda else torch.device("cpu"))
    if size > 1:  # counts, losses and results travel over gloo, a GPU's gradients over NCCL
        with errors_of_peers():
            dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
            machines = []  # torchrun numbers the ranks of a machine one after the other
            for other, its_local in enumerate(job.everywhere(local)):
                if its_local == 0:
                    machines.append([])
                machines[-1].append(other)
            job.machine, _ = dist.new_subgroups_by_enumeration(machines, backend="gloo")
    return job


def launched() -> bool:
    """Did torchrun start this process?"""
    return "TORCHELASTIC_RUN_ID" in os.environ


# ------------------------------------------------------------------------------------------------
# How a process leaves
# ------------------------------------------------------------------------------------------------


def sentence_of(problem: BaseException) -> str:
    """What the screen says of an error that ends the process; "" for one nobody foresaw."""
    if isinstance(problem, KeyboardInterrupt):
        return STOPPED
    if isinstance(problem, torch.OutOfMemoryError):
        reason = str(problem).splitlines()[0]
        return f"error: {reason} Smaller batches, --micro-batches, --model.checkpointing true help"
    if isinstance(problem, UnicodeEncodeError):
        around = problem.object[max(problem.start - 30, 0) : problem.end + 30]
        return f"error: {around!r} is no UTF-8 text (the name of a file?), rename it"
    if isinstance(problem, (ValueError, OSError, FloatingPointError, DecodeError, PeerLost)):
        more = "; the same command goes on from the last checkpoint"
        return f"error: {problem}{more if isinstance(problem, WorkerLost) else ''}"
    if isinstance(problem, RuntimeError) and dist.is_initialized() and lost_peer(problem):
        return f"error: {PEER_LOST}"  # within the backward, where DDP exchanges gradients
    return ""


def run_and_leave(main, words: list[str]) -> None:
    """A program from its command line to its exit status, whatever happens on the way."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed, as by >&-
            setattr(sys, name, open(os.devnull, "w"))
        elif isinstance(stream, io.TextIOWrapper):  # names need not be text of this screen
            stream.reconfigure(errors="backslashreplace")
    signal.signal(signal.SIGINT, stop)
    try:
        code, sentence = main(words), ""
    except SystemExit as end:  # --help; a stop after a signal, with everything saved
        code, sentence = end.code or 0, ""
        if isinstance(code, str):
            code, sentence = 1, code
    except BaseException as problem:
        sentence, code = sentence_of(problem), 2
        if isinstance(problem, KeyboardInterrupt):
            code = 128 + signal.SIGINT
        if not sentence:
            traceback.print_exception(problem)
            sentence, code = f"error, not foreseen: {problem!r}", 1
    leave(code, sentence)


def stop(number: int, frame) -> None:
    """Ctrl-C: end as by an error, so that what is unfinished is removed, but within seconds,
    whatever that waits for (a video being encoded). A second one ends the process at once."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    sys.unraisablehook = lambda *_: None  # raised within a destructor, it would be printed
    timer = threading.Timer(UNWIND_SEC, leave, (128 + number, STOPPED))
    timer.daemon = True
    timer.start()
    raise KeyboardInterrupt


def leave(code: int, sentence: str) -> None:
    """End this process now, with its loader workers, after one sentence on the screen, or "".

    Not by returning: the interpreter would join workers that ignore signals, and peers that are
    gone. Under torchrun the sentence goes where the launcher shows it last, once for the job.
    """
    with contextlib.suppress(ValueError):  # in a thread nothing interrupts
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sentence:
        last_words(sentence)
    for child in multiprocessing.active_children():
        child.kill()
    shutil.rmtree(multiprocessing.util.get_temp_dir(), ignore_errors=True)  # of their sockets
    with contextlib.suppress(Exception):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def last_words(sentence: str) -> None:
    """To stderr; under torchrun into the file from which it reads why a rank failed."""
    place = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not place:
        print(sentence, file=sys.stderr, flush=True)
        return
    extra = {"py_callstack": sentence, "timestamp": str(int(time.time()))}
    with contextlib.suppress(OSError), open(place, "w", encoding="utf-8") as file:
        json.dump({"message": {"message": sentence, "extraInfo": extra}}, file)


def watch_launcher() -> None:
    """Leave when the launcher is gone: nobody would ever end the ranks that it leaves behind."""
    launcher = int(os.environ.get(LAUNCHER, os.getppid()))  # it may be gone already

    def watch() -> None:
        while os.getppid() == launcher:
            time.sleep(1)
        os.environ.pop("TORCHELASTIC_ERROR_FILE", None)  # nobody reads it any more
        leave(1, "the launcher of the job is gone (killed?): this process leaves too")

    threading.Thread(target=watch, name="watch-launcher", daemon=True).start()


class Interrupt:
    """SIGINT and SIGTERM ask for a stop after the current step. A second Ctrl-C stops at once; a
    second SIGTERM does not: torchrun sends one to the ranks that are still saving."""

    def __init__(self):
        self.received = 0
        self.previous = {}
        for number in (signal.SIGINT, signal.SIGTERM):
            self.previous[number] = signal.signal(number, self.receive)

    def receive(self, number: int, frame) -> None:
        if launched() and not self.received:
            # A peer that hangs or is gone must not keep this rank: torchrun would wait 30 s for it.
            timer = threading.Timer(GRACE_SEC, leave, (128 + number, "stopped within a step"))
            timer.daemon = True
            timer.start()
        self.received = number
        signal.signal(signal.SIGINT, self.previous[signal.SIGINT])

    def restore(self) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)
