"""Images that crash or hang their decoder cost their own row and nothing else."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
from PIL import Image

from imgcls.curation.inspector import ImageInspector
from imgcls.errors import NotAnImage, RunFailed, StorageMissing

POISON = b"imgcls-test-poison"
HOOK = f"""
    import os, signal, time
    from PIL import Image

    real = Image.open

    def deadly(stream, *more, **named):
        if {POISON!r} in stream.getvalue():
            CRASH
        return real(stream, *more, **named)

    Image.open = deadly
"""


def draw(seed: int, comment: bytes = b"") -> bytes:
    sink = io.BytesIO()
    Image.new("RGB", (30 + seed, 20), (seed, 0, 0)).save(sink, "JPEG", comment=comment)
    return sink.getvalue()


@pytest.fixture
def hook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Makes images with the mark run a statement in the process that decodes them."""

    def install(crash: str) -> None:
        code = textwrap.dedent(HOOK).replace("CRASH", crash)
        (tmp_path / "sitecustomize.py").write_text(code)
        monkeypatch.syspath_prepend(str(tmp_path))

    return install


@pytest.fixture
def inspector() -> Iterator[ImageInspector]:
    with ImageInspector(max_pixels=10**6) as made:
        yield made


def list_children() -> list[psutil.Process]:
    return [
        each
        for each in psutil.Process().children()
        if any("imgcls.curation.inspector" in word for word in each.cmdline())
    ]


def test_images_and_errors_are_described(inspector: ImageInspector) -> None:
    image = inspector.inspect(draw(3))
    assert (image.status, image.width, image.height, image.type) == ("ok", 33, 20, "image/jpeg")
    assert inspector.inspect(b"no image").status == "not_an_image"
    assert inspector.inspect(draw(1)[:-40]).status == "truncated"
    assert inspector.inspect(StorageMissing("gone")).status == "missing"
    assert inspector.inspect(NotAnImage("text")).status == "not_an_image"
    assert inspector.inspect(draw(3)) == image
    assert len(list_children()) == 1


@pytest.mark.parametrize(
    ("crash", "error"),
    [
        ("os.kill(os.getpid(), signal.SIGSEGV)", "the decoder was ended by SIGSEGV while it was"),
        ("os._exit(7)", "the decoder ended with exit code 7 while it was decoded"),
    ],
)
def test_a_crash_is_the_row_of_its_image(
    hook: Callable[[str], None], crash: str, error: str
) -> None:
    hook(crash)
    images = [draw(seed, POISON if seed % 5 == 2 else b"") for seed in range(10)]
    with ImageInspector(max_pixels=10**6) as inspector, ThreadPoolExecutor(2) as pool:
        found = list(pool.map(inspector.inspect, images))
    expected = ["crashed" if seed % 5 == 2 else "ok" for seed in range(10)]
    assert [image.status for image in found] == expected
    assert [image.width for image in found] == [
        None if seed % 5 == 2 else 30 + seed for seed in range(10)
    ]
    assert error in str(found[2].error)
    assert list_children() == []


def test_a_decoder_that_hangs_is_ended(hook: Callable[[str], None]) -> None:
    hook("time.sleep(600)")
    with ImageInspector(max_pixels=10**6, timeout_s=0.5) as inspector:
        image = inspector.inspect(draw(0, POISON))
        assert (image.status, image.error) == (
            "crashed",
            "the decoder did not end within 0.5 s while it was decoded",
        )
        assert len(list_children()) == 0


def test_one_death_is_no_proof_against_an_image(
    hook: Callable[[str], None], tmp_path: Path
) -> None:
    marker = tmp_path / "died"
    hook(f"os.path.exists({str(marker)!r}) or (open({str(marker)!r}, 'w').close(), os._exit(1))")
    with ImageInspector(max_pixels=10**6) as inspector:
        assert inspector.inspect(draw(0, POISON)).status == "ok"
    assert marker.exists()


def test_a_child_that_cannot_start_ends_the_fetch_and_marks_no_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sitecustomize.py").write_text("import os; os._exit(3)")
    monkeypatch.syspath_prepend(str(tmp_path))
    with (
        ImageInspector(max_pixels=10**6) as inspector,
        pytest.raises(RunFailed, match="cannot start a process that decodes images"),
    ):
        inspector.inspect(draw(0))


def test_children_end_with_their_driver(tmp_path: Path) -> None:
    program = tmp_path / "driver.py"
    (tmp_path / "a.jpg").write_bytes(draw(0))
    program.write_text(
        textwrap.dedent(f"""
            import os, signal, sys
            from imgcls.curation.inspector import ImageInspector
            inspector = ImageInspector(10**6)
            print(inspector.inspect(open({str(tmp_path / "a.jpg")!r}, "rb").read()).status)
            (child,) = inspector._children
            print(child._process.pid, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        """)
    )
    done = subprocess.run(
        [sys.executable, program],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    status, pid = done.stdout.split()
    assert status == "ok"
    # the child reads the end of its connection and exits
    if psutil.pid_exists(int(pid)):
        psutil.Process(int(pid)).wait(60)
