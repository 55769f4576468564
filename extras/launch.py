"""torchrun for this project: starts the ranks, and leaves the last word to the one that failed.

`torchrun cofinetune.py` works as well; it ends with its own traceback, printed around the sentence
that says what was wrong. Here that sentence is the last thing on the screen.
"""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while torch is imported: silence

import logging
import os
import shutil
import sys
import tempfile

LAUNCHER = "COFINETUNE_LAUNCHER"  # in the environment of the ranks: the pid of this process


def sentence_of_end(rank: int, status: int) -> str:
    """Of a rank that left no sentence: killed by a signal (status below 0), or stopped by one."""
    how, number = ("killed", -status) if status < 0 else ("stopped", status - 128)
    if number not in set(signal.Signals):
        return f"rank {rank} ended with status {status}"
    why = " (the system kills when memory runs out)" if number == signal.SIGKILL else ""
    return (
        f"rank {rank} was {how} by {signal.Signals(number).name}{why}; "
        "the same command goes on from the last checkpoint"
    )


def main(arguments: list[str]) -> int:
    """torchrun's command line -> exit status; --nproc-per-node=auto: a GPU each, else two."""
    logging.disable(logging.ERROR)  # the launcher's own report of what the sentence says better
    import torch
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    options = parse_args(arguments)
    if options.nproc_per_node in ("auto", "0"):
        options.nproc_per_node = str(torch.cuda.device_count() or 2)
    os.environ[LAUNCHER] = str(os.getpid())
    notes = tempfile.mkdtemp(prefix="cofinetune_")  # why a rank failed is written there
    options.log_dir = options.log_dir or notes
    try:
        run(options)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        message = failure.message
        if failure.exitcode < 0 or not isinstance(message, dict):
            message = {"message": sentence_of_end(rank, failure.exitcode)}
        print(message["message"], file=sys.stderr)
        return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
    except SignalException as error:
        return 128 + error.sigval
    finally:
        shutil.rmtree(notes, ignore_errors=True)
    return 0


if __name__ == "__main__":
    status = main(sys.argv[1:])
    sys.stderr.flush()
    os._exit(status)  # torchrun's handlers raise, also while the interpreter ends
