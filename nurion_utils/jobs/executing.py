"""papermill, whose exit status is 75 if a cell calls ``sys.exit(75)``: what was done is saved, and there is more."""

import os
import sys

from papermill.__main__ import papermill
from papermill.exceptions import PapermillExecutionError

if __name__ == "__main__":
    try:
        papermill()
    except PapermillExecutionError as error:
        if (error.ename, error.evalue) != ("SystemExit", str(os.EX_TEMPFAIL)):
            raise
        sys.exit(os.EX_TEMPFAIL)
