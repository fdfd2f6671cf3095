"""Processes that publish, for tests that kill them.

    python -m tests.publishing.publish_process

Imports everything once, then forks a process for each line `RUN TARGET SECONDS` on stdin, kills it
after these seconds, unless they are `never`, and prints its exit code: -9 if it was killed.
"""

from __future__ import annotations

import os
import signal
import sys
import time

import deltalake  # noqa: F401
import pyiceberg.catalog.sql
import pyiceberg.io.pyarrow  # noqa: F401

from imgcls.publishing.publish import publish_run


def main() -> None:
    for line in sys.stdin:
        run, target, seconds = line.split()
        pid = os.fork()
        if pid == 0:
            publish_run(run, target)
            os._exit(0)
        if seconds != "never":
            time.sleep(float(seconds))
            os.kill(pid, signal.SIGKILL)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
