"""What a job tells of itself: lines for people, or one JSON object a line for a log system."""

from __future__ import annotations

import datetime
import json
import sys
from typing import Any, Literal, TextIO

LogFormat = Literal["text", "json"]


class _Settings:
    format: LogFormat = "text"
    always: dict[str, Any] = {}


def use(format: LogFormat, **always: Any) -> None:
    """Tell in this format from now on; in JSON every object has the fields `always`."""
    _Settings.format = format
    _Settings.always = always


def is_json() -> bool:
    return _Settings.format == "json"


def tell(event: str, message: str, stream: TextIO | None = None, **fields: Any) -> None:
    """Tell what happened. `fields` say it for machines and are left out of the text."""
    if is_json():
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
        body = {"time": now, "event": event, "message": message, **_Settings.always, **fields}
        line = json.dumps(body, default=str)
    else:
        line = f"note: {message}" if event == "note" else f"{event:<6}  {message}"
    show(line, stream)


def show(text: str, stream: TextIO | None = None) -> None:
    """Print; characters that the stream's encoding lacks are printed as escapes."""
    stream = stream or sys.stdout
    encoding = getattr(stream, "encoding", None) or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding), file=stream, flush=True)
