"""One of the processes that `stage` copies with when it is given no ranks: takes a pickled share, tells how far it is.

On its standard output it writes pickled numbers of bytes, and at last the dictionary of failures.
"""

import os
import pickle
import signal
import sys
import time

from nurion_utils.ranks.engine import end_with_parent
from nurion_utils.staging import copying


class Teller:
    """Adds up numbers of bytes and passes them on ten times a second: a message for each would slow copying down."""

    def __init__(self, send):
        self.send, self.sum, self.at = send, 0, time.monotonic()

    def __call__(self, done: int) -> None:
        self.sum += done
        if time.monotonic() - self.at > 0.1:
            self.flush()

    def flush(self) -> None:
        self.send(self.sum)
        self.sum, self.at = 0, time.monotonic()


def main() -> None:
    end_with_parent()
    if os.getppid() != int(sys.argv[1]):  # it was gone before that, and nobody would end this process
        return
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C is for the process that started this one, and ends it
    function, arguments, lock = pickle.load(sys.stdin.buffer)
    tell = Teller(lambda done: (pickle.dump(done, sys.stdout.buffer), sys.stdout.buffer.flush()))
    with copying.shared_lock(lock):
        failures = getattr(copying, function)(*arguments, tell)
    tell.flush()
    pickle.dump(failures, sys.stdout.buffer)


if __name__ == "__main__":
    main()
