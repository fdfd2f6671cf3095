"""Sampler of the stack of a process, a hundred times a second.

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
from types import FrameType

SAMPLES_VARIABLE = "STARTUP_SAMPLES"
INTERVAL_S = 0.01


def write_samples(folder: str, main_thread: int) -> None:
    """Write samples until the process ends: of the main thread, or of one that runs our code.

    Ray Data runs the function of an actor in a thread of its own.
    """
    with open(os.path.join(folder, f"{os.getpid()}.jsonl"), "a", buffering=1) as file:
        last: list[tuple[str, str]] | None = None
        own = threading.get_ident()
        while True:
            frames = sys._current_frames()
            stack = read_stack(frames.get(main_thread))
            if not is_known(stack):
                others = [read_stack(frame) for key, frame in frames.items() if key != own]
                stack = next((each for each in others if is_known(each)), [])
            if stack != last:
                file.write(json.dumps([time.time(), stack]) + "\n")
                last = stack
            time.sleep(INTERVAL_S)


def read_stack(frame: FrameType | None) -> list[tuple[str, str]]:
    """Module and name of each function, the outermost first."""
    stack = []
    while frame is not None:
        stack.append((str(frame.f_globals.get("__name__")), frame.f_code.co_name))
        frame = frame.f_back
    return stack[::-1]


def is_known(stack: list[tuple[str, str]]) -> bool:
    """Whether the stack is within an import or a function of this package."""
    return any(
        module.startswith("imgcls.") or (function == "<module>" and module != "__main__")
        for module, function in stack
    )


def start() -> None:
    """Sample this process in a thread."""
    folder, thread = os.environ[SAMPLES_VARIABLE], threading.get_ident()
    threading.Thread(target=write_samples, args=(folder, thread), daemon=True).start()


if __name__ == "sitecustomize" and SAMPLES_VARIABLE in os.environ:
    start()
    os.register_at_fork(after_in_child=start)
