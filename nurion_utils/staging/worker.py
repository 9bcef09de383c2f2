"""One of the processes that `stage` copies with when it is given no ranks.

Pickled on its standard input it takes a function of `copying`, and the arguments; on its standard output it writes
pickled numbers of bytes that are done, and at last what the function returns.
"""

import os
import pickle
import signal
import sys
import time

from nurion_utils.ranks.engine import end_with_parent
from nurion_utils.staging.copying import lock


def main() -> None:
    end_with_parent()
    if os.getppid() != int(sys.argv[1]):  # it was gone before that, and nobody would end this process
        return
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C is for the process that started this one, and ends it
    function, (source, destination, share) = pickle.load(sys.stdin.buffer)
    done, told_at = 0, time.monotonic()

    def tell(amount: int) -> None:
        """Ten times a second: a message for each amount would slow copying down."""
        nonlocal done, told_at
        done += amount
        if time.monotonic() - told_at > 0.1:
            pickle.dump(done, sys.stdout.buffer)
            sys.stdout.buffer.flush()
            done, told_at = 0, time.monotonic()

    with lock(destination, first=False):
        failures = function(source, destination, share, tell)
    pickle.dump(done, sys.stdout.buffer)
    pickle.dump(failures, sys.stdout.buffer)


if __name__ == "__main__":
    main()
