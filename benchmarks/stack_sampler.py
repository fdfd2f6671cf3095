"""Sampler of the stack of a process's main thread, a hundred times a second.

A copy of this file, named sitecustomize.py and found through PYTHONPATH, makes every Python process
of a job write its samples to the folder in SAMPLES_VARIABLE: lines of JSON with the time, and the
module and name of each function from the outermost to the innermost. A stack that stays the same is
written once.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time

SAMPLES_VARIABLE = "STARTUP_SAMPLES"
INTERVAL_S = 0.01


def write_samples(folder: str, thread: int) -> None:
    """Write samples of a thread's stack until the process ends."""
    with open(os.path.join(folder, f"{os.getpid()}.jsonl"), "a", buffering=1) as file:
        last = None
        while True:
            frame = sys._current_frames().get(thread)
            stack = []
            while frame is not None:
                module = str(frame.f_globals.get("__name__"))
                stack.append((module, frame.f_code.co_name))
                frame = frame.f_back
            if stack != last:
                file.write(json.dumps([time.time(), stack[::-1]]) + "\n")
                last = stack
            time.sleep(INTERVAL_S)


if __name__ == "sitecustomize" and SAMPLES_VARIABLE in os.environ:
    threading.Thread(
        target=write_samples,
        args=(os.environ[SAMPLES_VARIABLE], threading.get_ident()),
        daemon=True,
    ).start()
