"""A copy of this process that does one thing and ends: what is imported is not imported again."""

import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable


def forked(what: Callable[[], object]) -> int:
    """Starts a copy, which ends with 0 where nothing was raised; returns its number."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a copy has one thread, whatever others there are here
        child = os.fork()
        if child:
            return child
        code = 1
        try:
            for kind in (signal.SIGINT, signal.SIGTERM):  # what runs the tests may have others
                signal.signal(kind, signal.SIG_DFL)
            what()
            code = 0
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
        finally:
            os._exit(code)


def ended(child: int) -> int:
    """Waits for the end of a copy: its code, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
