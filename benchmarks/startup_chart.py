"""Flame chart of the processes of a job as SVG: per process, its nested steps over time."""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

MAX_DEPTH = 7
WIDTH = 1300
LEFT, ROW, GAP = 16, 15, 26
MIN_WIDTH = 2.0
"""Narrower steps are not drawn, in pixels."""
COLORS = {
    "imgcls": "#d3ecc8",
    "ray": "#b4d2f0",
    "torch": "#f6c7a0",
    "torchvision": "#f6c7a0",
    "pandas": "#d9c5ec",
    "pyarrow": "#d9c5ec",
    "numpy": "#d9c5ec",
}
WRAPPERS = ("cli", "reference", "log", "imports", "data.retries")
"""Modules of this package whose functions only call the next step."""
OTHER_COLOR = "#e4e4e4"
STEP_COLOR = "#a5d39a"
"""Color of the functions of this package."""

Steps = tuple[str, ...]
"""Nested steps, the outermost first."""


@dataclass(frozen=True)
class ProcessTrack:
    """A process in the chart.

    since:   seconds after the command
    used:    CPU seconds until the end of the chart
    samples: seconds after the command, and the steps from then on
    """

    name: str
    since: float
    used: float
    samples: list[tuple[float, Steps]]


@dataclass(frozen=True)
class Step:
    """A rectangle of the chart: a step, its depth, and its start and end in seconds."""

    name: str
    depth: int
    start: float
    end: float


def read_samples(file: Path, origin: float) -> list[tuple[float, Steps]]:
    """The samples that a process has written; seconds after `origin`, as in `time.time()`."""
    if not file.exists():
        return []
    lines = file.read_text().splitlines()
    rows = [json.loads(line) for line in lines if line.endswith("]")]
    return [(moment - origin, simplify_stack(stack)) for moment, stack in rows]


def simplify_stack(stack: Iterable[Sequence[str]]) -> Steps:
    """The imports, and the functions of this package, in a stack of (module, function)."""
    steps: list[str] = []
    for module, function in stack:
        top, _, rest = module.partition(".")
        if function == "<module>" and module != "__main__":
            is_nested = any(step == f"import {top}" for step in steps)
            name = f"import {top}.{rest.partition('.')[0]}" if is_nested and rest else top
            name = name if name.startswith("import") else f"import {name}"
        elif top == "imgcls":
            if rest in WRAPPERS:
                continue
            name = f"{rest}.{function}"
        elif (module, function) == ("ray._private.worker", "init"):
            name = "ray.init"
        else:
            continue
        if name not in steps:
            steps.append(name)
    return tuple(steps[:MAX_DEPTH])


def join_steps(samples: Sequence[tuple[float, Steps]], end: float) -> list[Step]:
    """Rectangles of the samples; equal steps that follow each other are one."""
    steps: list[Step] = []
    is_open: list[tuple[str, float]] = []
    for moment, path in [*samples, (end, ())]:
        moment = min(moment, end)
        same = 0
        while same < min(len(path), len(is_open)) and is_open[same][0] == path[same]:
            same += 1
        steps += [
            Step(name, same + depth, start, moment)
            for depth, (name, start) in enumerate(is_open[same:])
        ]
        is_open[same:] = [(name, moment) for name in path[same:]]
    return [step for step in steps if step.end > step.start]


def render_chart(title: str, tracks: Sequence[ProcessTrack], end: float) -> str:
    """The chart from the command to `end` seconds after it."""
    scale = WIDTH / end
    body: list[str] = []
    top = 64.0
    for track in sorted(tracks, key=lambda each: each.since):
        steps = [
            step
            for step in join_steps(track.samples, end)
            if (step.end - step.start) * scale >= MIN_WIDTH
        ]
        body.append(_render_track(track, steps, top, end, scale))
        top += GAP + ROW * (1 + max((step.depth for step in steps), default=0))
    width = LEFT * 2 + WIDTH
    axis = "".join(
        f'<path d="M{LEFT + second * scale:.1f} 44V{top:.0f}" stroke="#ddd"/>'
        f'<text x="{LEFT + second * scale:.1f}" y="40" text-anchor="middle">{second} s</text>'
        for second in range(int(end) + 1)
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {top:.0f}" '
        f'width="{width}" height="{top:.0f}" font-family="sans-serif" font-size="10">'
        f'<rect width="100%" height="100%" fill="#fff"/>'
        f'<text x="{LEFT}" y="20" font-size="13">{html.escape(title)}</text>{axis}'
        + "\n".join(body)
        + "</svg>\n"
    )


def _render_track(
    track: ProcessTrack, steps: Sequence[Step], top: float, end: float, scale: float
) -> str:
    text = f"{track.name}: {track.used:.2f} CPU s"
    since = LEFT + track.since * scale
    place = min(since, LEFT + WIDTH - 6 * len(text))
    parts = [
        f'<text x="{place:.1f}" y="{top:.0f}" font-weight="bold">{html.escape(text)}</text>',
        f'<path d="M{since:.1f} {top + 3:.0f}H{LEFT + end * scale:.1f}" stroke="#888"/>',
    ]
    for step in steps:
        x, y = LEFT + step.start * scale, top + 4 + step.depth * ROW
        width = (step.end - step.start) * scale
        parts.append(
            f'<rect x="{x:.1f}" y="{y:.0f}" width="{width:.1f}" height="{ROW - 1}" '
            f'fill="{_color(step.name)}"><title>{html.escape(step.name)}, '
            f"{step.end - step.start:.2f} s</title></rect>"
        )
        room = int((width - 4) / 5.6)
        if room >= 4:
            shown = step.name if len(step.name) <= room else step.name[: room - 1] + "…"
            parts.append(f'<text x="{x + 2:.1f}" y="{y + 10:.0f}">{html.escape(shown)}</text>')
    return "".join(parts)


def _color(step: str) -> str:
    if not step.startswith("import "):
        return COLORS["ray"] if step == "ray.init" else STEP_COLOR
    return COLORS.get(step.removeprefix("import ").partition(".")[0], OTHER_COLOR)
