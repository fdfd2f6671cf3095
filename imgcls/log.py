"""Logging: one logger per module below `imgcls`, and the handler that the command installs.

A program that imports imgcls configures Python's `logging` as for any other library; imgcls itself
writes nothing then. The `imgcls` command installs one handler, which writes lines for people or one
JSON object per line for a log system to stdout.
"""

from __future__ import annotations

import contextlib
import contextvars
import datetime
import json
import logging
import sys
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, Literal, TextIO

LogFormat = Literal["text", "json"]

_ROOT = logging.getLogger("imgcls")
_context: contextvars.ContextVar[Mapping[str, Any]] = contextvars.ContextVar(
    "log", default=MappingProxyType({})
)


def emit(event: str, message: str, /, **fields: Any) -> None:
    """Log an event to the logger of the calling module: `note` at WARNING, all others at INFO.

    Parameters
    ----------
    event : the word at the start of the line, such as "plan"
    fields : values for machines; the text format leaves them out
    """
    level = logging.WARNING if event == "note" else logging.INFO
    _find_caller(2).log(level, "%s", message, extra={"event": event, "fields": fields})


def show(text: str) -> None:
    """Log text that the command shows as it is: a result, or a line of a table."""
    _find_caller(2).info("%s", text, extra={"event": "result", "fields": {}})


def _find_caller(depth: int) -> logging.Logger:
    """The logger of the module that called; the package's own for a script outside of it."""
    name = str(sys._getframe(depth).f_globals["__name__"])
    return logging.getLogger(name) if name.partition(".")[0] == "imgcls" else _ROOT


@contextlib.contextmanager
def context(**fields: Any) -> Iterator[None]:
    """Add fields, such as `run_id`, to every event that is logged in the block."""
    token = _context.set({**_context.get(), **fields})
    try:
        yield
    finally:
        _context.reset(token)


class CommandHandler(logging.Handler):
    """Writes events to stdout, and warnings that are no notes to stderr."""

    def __init__(self, format: LogFormat) -> None:
        super().__init__()
        self.is_json = format == "json"
        self.addFilter(_attach_context)

    def emit(self, record: logging.LogRecord) -> None:
        event = getattr(record, "event", "")
        is_warning = record.levelno >= logging.WARNING and event != "note"
        try:
            text = self._format_json(record) if self.is_json else _format_text(record, event)
            _write(text, sys.stderr if is_warning else sys.stdout)
        except Exception as error:  # as every handler of logging does
            if isinstance(error, BrokenPipeError) or (
                isinstance(error, OSError) and event == "result"
            ):
                raise  # the command ends
            self.handleError(record)

    @staticmethod
    def _format_json(record: logging.LogRecord) -> str:
        time = datetime.datetime.fromtimestamp(record.created, datetime.UTC)
        body = {
            "time": time.isoformat(timespec="milliseconds"),
            "event": getattr(record, "event", record.levelname.lower()),
            "message": record.getMessage(),
            **getattr(record, "context", {}),
            **getattr(record, "fields", {}),
        }
        return json.dumps(body, default=str)


def _attach_context(record: logging.LogRecord) -> bool:
    record.context = _context.get()
    return True


def _format_text(record: logging.LogRecord, event: str) -> str:
    message = record.getMessage()
    if event in ("", "result"):
        return message
    return f"note: {message}" if event == "note" else f"{event:<6}  {message}"


def _write(text: str, stream: TextIO) -> None:
    """Print; characters that the stream's encoding lacks are printed as escapes."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding), file=stream, flush=True)


@contextlib.contextmanager
def command_handler(format: LogFormat = "text") -> Iterator[CommandHandler]:
    """Install the command's handler for a block; events of imgcls go to it alone."""
    handler = CommandHandler(format)
    level, propagate, handlers = _ROOT.level, _ROOT.propagate, _ROOT.handlers[:]
    _ROOT.handlers[:] = [handler]
    _ROOT.setLevel(logging.INFO)
    _ROOT.propagate = False
    try:
        yield handler
    finally:
        _ROOT.handlers[:] = handlers
        _ROOT.setLevel(level)
        _ROOT.propagate = propagate


def find_handler() -> CommandHandler | None:
    """The handler of the command that is running, or None in a program that imports imgcls."""
    handlers = (each for each in _ROOT.handlers if isinstance(each, CommandHandler))
    return next(handlers, None)


def is_json() -> bool:
    """Whether the running command writes JSON lines."""
    handler = find_handler()
    return handler is not None and handler.is_json


def find_terminal() -> TextIO | None:
    """The terminal on which a live line may be drawn; None in a program, a pipe or with JSON."""
    return sys.stdout if find_handler() and not is_json() and sys.stdout.isatty() else None
