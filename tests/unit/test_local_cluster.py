"""The tools of the test cluster: built once, and nothing ended that was not started here."""

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from local_cluster.binaries import (
    PROGRAMS,
    BinariesUnavailableError,
    binaries_directory,
    provide_binaries,
)
from local_cluster.processes import (
    Process,
    ProcessEndedError,
    end_process,
    is_running,
    start_process,
    wait_until,
)

GO = """\
#!/bin/sh
# `go list` and `go build -o PROGRAM`, noted in a file.
echo "$1" >> "$CALLS"
[ "$1" = "$FAILS" ] && { echo "no route to the module proxy" >&2; exit 1; }
while [ $# -gt 0 ]; do
  [ "$1" = -o ] && echo program > "$2"
  shift
done
exit 0
"""


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache and a Go that notes what it is asked for in this file."""
    go = tmp_path / "bin" / "go"
    go.parent.mkdir()
    go.write_text(GO)
    go.chmod(0o755)
    monkeypatch.setenv("PATH", str(go.parent), prepend=os.pathsep)
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    monkeypatch.setenv("FAILS", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("local_cluster.binaries.NEEDED_BYTES", 0)
    return tmp_path / "calls"


def test_binaries_are_built_once(calls: Path) -> None:
    directory = provide_binaries(lambda _: None)
    assert provide_binaries(lambda _: None) == directory == binaries_directory()
    assert {(directory / name).read_text() for name in PROGRAMS} == {"program\n"}
    assert calls.read_text().splitlines() == ["list", "build"]


def test_interrupted_build_is_begun_again(calls: Path) -> None:
    unfinished = binaries_directory().with_name(f"{binaries_directory().name}.tmp")
    unfinished.mkdir(parents=True)
    (unfinished / "half").touch()
    assert not (provide_binaries(lambda _: None) / "half").exists()
    assert not unfinished.exists()


def test_failed_build_leaves_no_binaries(calls: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAILS", "build")
    with pytest.raises(subprocess.CalledProcessError):
        provide_binaries(lambda _: None)
    assert not binaries_directory().exists()


def test_modules_that_cannot_be_had_are_named_with_a_cure(
    calls: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAILS", "list")
    with pytest.raises(
        BinariesUnavailableError, match=r"\(no route to the module proxy\); .*GOPROXY"
    ):
        provide_binaries(lambda _: None)


def test_machine_without_go_is_told_what_to_do(
    calls: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BinariesUnavailableError, match=r"install Go 1\.26 or newer, or give"):
        provide_binaries(lambda _: None)


def test_too_little_disk_is_told_before_the_build(
    calls: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("local_cluster.binaries.NEEDED_BYTES", 2**70)
    with pytest.raises(BinariesUnavailableError, match="GB left"):
        provide_binaries(lambda _: None)
    assert not calls.exists()


SLEEP = ["sleep", "300"]


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "log"


def test_process_is_ended(log: Path) -> None:
    process = start_process("sleep", SLEEP, log, ends_with_parent=True)
    assert is_running(process)
    end_process(process, patience_seconds=10)
    assert not is_running(process)
    end_process(process, patience_seconds=10)


def test_process_that_ignores_the_request_is_ended_by_force(log: Path) -> None:
    command = ["sh", "-c", "trap '' TERM; echo ready; while :; do sleep 0.1; done"]
    process = start_process("deaf", command, log, ends_with_parent=True)
    wait_until(lambda: "ready" in log.read_text(), what="ready", seconds=10)
    end_process(process, patience_seconds=0.2)
    assert not is_running(process)


def test_another_process_with_the_same_number_is_let_be(log: Path) -> None:
    process = start_process("sleep", SLEEP, log, ends_with_parent=True)
    other = process._replace(began=process.began - 1)
    assert not is_running(other)
    end_process(other, patience_seconds=10)
    assert is_running(process)
    end_process(process, patience_seconds=10)


def test_process_ends_with_the_one_that_started_it(log: Path, tmp_path: Path) -> None:
    program = f"""
        import json, os, signal
        from pathlib import Path
        from local_cluster.processes import start_process
        process = start_process("sleep", {SLEEP!r}, Path({str(log)!r}), ends_with_parent=True)
        Path({str(tmp_path / "process")!r}).write_text(json.dumps(process))
        os.kill(os.getpid(), signal.SIGKILL)
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    starter = [sys.executable, "-c", textwrap.dedent(program)]
    done = subprocess.run(starter, env=environment, check=False)
    assert done.returncode == -signal.SIGKILL
    process = Process(*json.loads((tmp_path / "process").read_text()))
    wait_until(lambda: not is_running(process), what="end", seconds=10)


def test_waiting_stops_when_a_process_ends_and_shows_its_log(log: Path) -> None:
    command = ["sh", "-c", "echo cannot listen; exit 1"]
    process = start_process("server", command, log, ends_with_parent=True)
    with pytest.raises(ProcessEndedError, match="server ended:\ncannot listen"):
        wait_until(lambda: False, what="answer", seconds=30, processes=[process])
    end_process(process, patience_seconds=1)


def test_waiting_is_bounded(log: Path) -> None:
    with pytest.raises(TimeoutError, match="no answer within 0 s"):
        wait_until(lambda: False, what="answer", seconds=0)
