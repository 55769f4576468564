"""torchrun for this project: starts the ranks, and leaves the last word to the one that failed.

`torchrun cofinetune.py` works as well; it ends with its own traceback, printed around the sentence
that says what was wrong. Here that sentence is the last thing on the screen.
"""

import logging
import signal
import sys


def sentence_of_killed(rank: int, number: int) -> str:
    why = " (the system kills when memory runs out)" if number == signal.SIGKILL else ""
    return (
        f"rank {rank} was killed by {signal.Signals(number).name}{why}; "
        "the same command goes on from the last checkpoint"
    )


def main(arguments: list[str]) -> int:
    logging.disable(logging.ERROR)  # the launcher's own report of what the sentence says better
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    try:
        run(parse_args(arguments))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        message = failure.message
        if isinstance(message, dict):
            message = message.get("message", "")
        if failure.exitcode < 0:
            message = sentence_of_killed(rank, -failure.exitcode)
        if message:
            print(message, file=sys.stderr)
        return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
    except SignalException as error:
        return 128 + error.sigval
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
