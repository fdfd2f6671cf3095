"""One owner per output, among real processes: rivals, the dead, the silent and the overtaken."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from imgcls.data.storage import disk, filesystem
from imgcls.errors import OutputError, OutputLocked, RunFailed
from imgcls.runs.lease import Lease
from tests.processes import REPOSITORY, wait_for

TERM = 1.0
"""A short term, so that waiting it out costs a second; no test depends on how long it takes."""

HOLD = """
import sys, time
from imgcls import log
from imgcls.errors import OutputLocked, RunFailed
from imgcls.runs.lease import Lease

shown = log.command_handler()
shown.__enter__()
print("ready", flush=True)
sys.stdin.readline()
try:
    lease = Lease.acquire(sys.argv[1], float(sys.argv[2]))
except OutputLocked as error:
    print("busy", error, flush=True)
    sys.exit(2)
print("held", flush=True)
for command in sys.stdin:
    if command.strip() == "check":
        try:
            lease.check()
            print("mine", flush=True)
        except RunFailed as error:
            print("lost", error, flush=True)
    if command.strip() == "release":
        lease.release()
        print("released", flush=True)
"""


class Driver:
    """A process that takes and releases a lease on request."""

    def __init__(self, output: Path, term: float = TERM) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", HOLD, str(output), str(term)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=REPOSITORY,
        )
        assert self.read_line() == "ready"

    def read_line(self) -> str:
        """The next line but notes of waiting."""
        assert self.process.stdout is not None
        while (line := self.process.stdout.readline()).startswith("waiting"):
            pass
        return line.strip()

    def send(self, command: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{command}\n")
        self.process.stdin.flush()

    def request(self, command: str) -> str:
        self.send(command)
        return self.read_line()


@pytest.fixture
def driver(tmp_path: Path) -> Iterator[Callable[..., Driver]]:
    """Starts drivers that want the lease of `tmp_path / "out"`."""
    with contextlib.ExitStack() as stack:

        def start(term: float = TERM) -> Driver:
            started = Driver(tmp_path / "out", term)
            stack.callback(started.process.wait)
            stack.callback(started.process.kill)
            return started

        yield start


@pytest.fixture
def output(tmp_path: Path) -> str:
    return str(tmp_path / "out")


def record(output: str, number: int) -> Path:
    return Path(output) / "_lease" / f"{number:06d}.json"


def move_elsewhere(path: Path) -> None:
    """Make a record look like that of a machine whose processes cannot be seen."""
    body = json.loads(path.read_text())
    body["machine"] = "another machine"
    path.write_text(json.dumps(body))


# ------------------------------------------------------------------ rivals


def test_of_many_rivals_exactly_one_acquires(driver: Callable[..., Driver], output: str) -> None:
    rivals = [driver() for _ in range(5)]
    for rival in rivals:
        rival.send("go")
    lines = [rival.read_line() for rival in rivals]
    assert sorted(line.partition(" ")[0] for line in lines) == ["busy"] * 4 + ["held"]
    winner = rivals[lines.index("held")]
    for line in lines:
        if line != "held":
            assert f"(pid {winner.process.pid}). Wait for it" in line
            assert "another --output" in line
    assert winner.request("check") == "mine"


def test_of_many_rivals_for_a_dead_drivers_lease_exactly_one_acquires(
    driver: Callable[..., Driver], output: str
) -> None:
    dead = driver()
    assert dead.request("go") == "held"
    dead.process.kill()
    rivals = [driver() for _ in range(5)]
    for rival in rivals:
        rival.send("go")
    lines = [rival.read_line() for rival in rivals]
    assert sorted(line.partition(" ")[0] for line in lines) == ["busy"] * 4 + ["held"]
    assert rivals[lines.index("held")].request("check") == "mine"


# ------------------------------------------------------------------ holders that can be seen


def test_a_killed_driver_of_this_machine_is_replaced_without_waiting(
    driver: Callable[..., Driver], output: str, capsys: pytest.CaptureFixture[str]
) -> None:
    dead = driver()
    assert dead.request("go") == "held"
    dead.process.send_signal(signal.SIGKILL)
    dead.process.wait()
    lease = Lease.acquire(output, term=3600)
    assert "waiting" not in capsys.readouterr().out
    lease.check()
    lease.release()


def test_a_zombie_process_of_a_killed_driver_counts_as_dead(
    driver: Callable[..., Driver], output: str
) -> None:
    zombie = driver()
    assert zombie.request("go") == "held"
    zombie.process.send_signal(signal.SIGKILL)
    stat = Path(f"/proc/{zombie.process.pid}/stat")
    wait_for(lambda: stat.read_text().rpartition(")")[2].split()[0] == "Z")
    Lease.acquire(output, term=3600).release()


def test_a_live_driver_is_not_replaced_however_silent(
    driver: Callable[..., Driver], output: str
) -> None:
    holder = driver()
    assert holder.request("go") == "held"
    os.kill(holder.process.pid, signal.SIGSTOP)  # it renews nothing, but it may go on
    try:
        with pytest.raises(OutputLocked, match=rf"locked by .* \(pid {holder.process.pid}\)"):
            Lease.acquire(output, term=0.01)
    finally:
        os.kill(holder.process.pid, signal.SIGCONT)
    assert holder.request("check") == "mine"


def test_another_process_with_the_dead_drivers_number_is_not_taken_for_it(
    driver: Callable[..., Driver], output: str
) -> None:
    holder = driver()
    assert holder.request("go") == "held"
    holder.process.kill()
    holder.process.wait()
    body = json.loads(record(output, 1).read_text())
    record(output, 1).write_text(json.dumps({**body, "pid": os.getpid()}))
    Lease.acquire(output, term=3600).release()


# ------------------------------------------------------------------ holders elsewhere


def test_a_silent_driver_elsewhere_is_replaced_after_a_term(
    output: str, capsys: pytest.CaptureFixture[str]
) -> None:
    silent = Lease.acquire(output, term=3600)  # its next renewal would be in 12 minutes
    move_elsewhere(record(output, 1))
    heir = Lease.acquire(output, term=TERM)
    assert "waiting up to 1 s" in capsys.readouterr().out
    heir.check()
    with pytest.raises(RunFailed, match="another driver has taken over; no results were lost"):
        silent.check()
    heir.release()


def test_a_driver_elsewhere_that_renews_is_not_replaced(output: str) -> None:
    alive = Lease.acquire(output, term=TERM)
    alive._build_record = lambda: json.dumps(  # type: ignore[method-assign]
        {
            "owner": "x",
            "beats": alive._renewals,
            "host": "far",
            "machine": "m",
            "pid": 7,
            "started": "",
        }
    ).encode()
    wait_for(lambda: '"far"' in record(output, 1).read_text())
    with pytest.raises(OutputLocked, match=r"is locked by far \(pid 7\)"):
        Lease.acquire(output, term=60)
    alive.check()
    alive.release()


def test_a_driver_elsewhere_that_gives_back_while_a_rival_waits_lets_it_in(
    driver: Callable[..., Driver], output: str
) -> None:
    holder = Lease.acquire(output, term=3600)
    move_elsewhere(record(output, 1))
    waiting = driver(3600)
    waiting.send("go")
    assert waiting.process.stdout is not None
    assert "waiting up to 3600 s" in waiting.process.stdout.readline()
    holder.release()
    assert waiting.read_line() == "held"


# ------------------------------------------------------------------ losing it, giving it back


def test_a_lease_that_cannot_be_renewed_for_a_term_is_lost(output: str) -> None:
    lease = Lease.acquire(output, term=TERM)
    lease._stop.set()  # as when the store does not answer
    lease._thread.join()
    lease._last_renewal = time.monotonic() - 2 * TERM
    with pytest.raises(RunFailed, match="could not be renewed for 1 s; no results were lost"):
        lease.check()


def test_a_renewed_lease_outlives_its_term(output: str) -> None:
    lease = Lease.acquire(output, term=0.5)
    wait_for(lambda: json.loads(record(output, 1).read_text())["beats"] >= 8)
    lease.check()
    lease.release()


def test_an_overtaken_driver_learns_it_when_it_renews_and_takes_nothing_with_it(
    output: str,
) -> None:
    old = Lease.acquire(output, term=TERM)
    record(output, 2).write_bytes(record(output, 1).read_bytes())
    wait_for(lambda: not old._thread.is_alive())
    with pytest.raises(RunFailed, match="another driver has taken over"):
        old.check()
    old.release()
    assert record(output, 2).exists()


def test_an_earlier_check_is_accepted_for_a_while_and_each_later_one_lists_again(
    output: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lease = Lease.acquire(output, term=3600)
    listed: list[str] = []

    def list_names(folder: str) -> list[str]:
        listed.append(folder)
        return filesystem_list_names(folder)

    filesystem_list_names = filesystem.list_names
    monkeypatch.setattr(filesystem, "list_names", list_names)
    for _ in range(100):
        lease.check(max_age_s=600)
    assert len(listed) == 1
    record(output, 2).write_bytes(record(output, 1).read_bytes())
    lease.check(max_age_s=600)
    lease._last_listing -= 600
    with pytest.raises(RunFailed, match="another driver has taken over"):
        lease.check(max_age_s=600)
    with pytest.raises(RunFailed, match="another driver has taken over"):
        lease.check(max_age_s=600)  # from then on, without a listing
    assert len(listed) == 2


def test_giving_a_lease_back_cleans_up_and_lets_the_next_in(
    driver: Callable[..., Driver], output: str
) -> None:
    dead = driver()
    assert dead.request("go") == "held"
    dead.process.kill()
    dead.process.wait()
    lease = Lease.acquire(output, TERM)
    assert [record(output, n).exists() for n in (1, 2)] == [True, True]
    lease.release()
    assert not (Path(output) / "_lease").exists()
    after = driver()
    assert after.request("go") == "held"
    assert after.request("release") == "released"
    assert not (Path(output) / "_lease").exists()


def test_files_of_a_driver_killed_while_it_renewed_are_removed_and_not_those_of_a_rival(
    driver: Callable[..., Driver], output: str
) -> None:
    dead = driver()
    assert dead.request("go") == "held"
    dead.process.kill()
    dead.process.wait()
    unfinished = Path(disk.temporary_name(str(record(output, 1))))
    unfinished.write_bytes(b"{")
    lease = Lease.acquire(output, TERM)
    rival = Path(disk.temporary_name(str(record(output, 3))))
    rival.write_bytes(b"{")
    lease.release()
    assert not unfinished.exists()
    assert rival.exists()


def test_a_damaged_record_is_refused_with_the_remedy(output: str) -> None:
    record(output, 1).parent.mkdir(parents=True)
    record(output, 1).write_text("{")
    with pytest.raises(OutputError, match=r"000001\.json: is damaged .* remove it"):
        Lease.acquire(output, TERM)
