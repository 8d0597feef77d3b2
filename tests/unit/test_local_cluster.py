"""The tools of the test cluster: built once, and nothing ended that was not started here."""

import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import textwrap
from pathlib import Path

import pytest

from local_cluster.binaries import (
    PROGRAMS,
    BinariesUnavailableError,
    binaries_directory,
    provide_binaries,
)
from local_cluster.debian import PACKAGES, provide_debian
from local_cluster.node import why_no_node
from local_cluster.node_cluster import end_leftovers, own_directory
from local_cluster.oci import build_image
from local_cluster.processes import (
    Process,
    ProcessEndedError,
    end_process,
    is_running,
    start_process,
    wait_until,
)
from local_cluster.programs import provide_helm

GO = """\
#!/bin/sh
# `go list`, `go build -o PROGRAM` and `go install .../NAME@VERSION`, noted in a file.
echo "$1" >> "$CALLS"
[ "$1" = "$FAILS" ] && { echo "no route to the module proxy" >&2; exit 1; }
while [ $# -gt 0 ]; do
  [ "$1" = -o ] && echo program > "$2"
  last=$1
  shift
done
case $last in *@*) name=${last##*/}; echo "$last" > "$GOBIN/${name%@*}";; esac
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


def test_program_is_installed_once_at_its_version(calls: Path) -> None:
    assert provide_helm(lambda _: None).read_text() == "helm.sh/helm/v4/cmd/helm@v4.3.1\n"
    assert provide_helm(lambda _: None).name == "helm"
    assert calls.read_text().splitlines() == ["install"]


def test_program_that_cannot_be_had_is_named_with_a_cure(
    calls: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAILS", "install")
    with pytest.raises(
        BinariesUnavailableError, match=r"build helm v4\.3\.1 \(no route to the module proxy\)"
    ):
        provide_helm(lambda _: None)
    assert not list(binaries_directory().parent.glob("helm-*"))


APT = """\
#!/bin/sh
# `apt-get update` and `apt-get download PACKAGE...`, below the folder of the call.
while [ $# -gt 0 ] && [ "$1" != download ]; do shift; done
[ $# -gt 0 ] && shift
for package in "$@"; do echo "$package" > "$package.deb"; done
"""
DPKG = """\
#!/bin/sh
# `dpkg-deb --extract PACKAGE FOLDER`
mkdir -p "$3/usr/bin" && cp "$2" "$3/usr/bin"
"""


def test_debian_programs_are_unpacked_and_not_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    for name, text in {"apt-get": APT, "dpkg-deb": DPKG}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    debian = provide_debian(lambda _: None)
    unpacked = {path.name for path in (debian.root / "usr/bin").iterdir()}
    assert unpacked == {f"{package}.deb" for package in PACKAGES}
    assert str(debian.root / "usr/bin") in debian.environment["PATH"].split(os.pathsep)
    assert [path.name for path in debian.root.parent.iterdir() if path.is_dir()] == [
        debian.root.name
    ]
    (tmp_path / "apt-get").unlink()
    assert provide_debian(lambda _: None) == debian


def test_machine_without_apt_is_told_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BinariesUnavailableError, match=r"has no apt-get; give a cluster by"):
        provide_debian(lambda _: None)


def test_user_who_is_not_root_is_told_that_a_node_needs_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert "run pytest as root, or give a cluster" in str(why_no_node())


def test_image_is_the_program_alone_and_the_same_every_time(tmp_path: Path) -> None:
    program = tmp_path / "tool"
    program.write_bytes(b"program")
    archive, digest = build_image(program, "pause")
    assert build_image(program, "pause") == (archive, digest)
    assert build_image(program, "serve")[1] != digest
    with tarfile.open(fileobj=io.BytesIO(archive)) as file:
        content = {entry.name: file.extractfile(entry).read() for entry in file}  # type: ignore[union-attr]  # files alone
    blobs = {name: data for name, data in content.items() if name.startswith("blobs/")}
    assert {f"blobs/sha256/{hashlib.sha256(data).hexdigest()}" for data in blobs.values()} == {
        *blobs
    }
    manifest = json.loads(content[f"blobs/{digest.replace(':', '/')}"])
    (layer,) = manifest["layers"]
    with tarfile.open(
        fileobj=io.BytesIO(content[f"blobs/{layer['digest'].replace(':', '/')}"])
    ) as file:
        assert [(entry.name, entry.mode) for entry in file] == [("tool", 0o755)]


def test_leftovers_of_ended_processes_alone_are_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    mine = own_directory("tests")
    number = mine.name.split("-")[2]
    another = mine.with_name(f"node-of-{number}-1-tests")
    for directory in (mine, another):
        directory.mkdir(parents=True)
    end_leftovers()
    assert mine.exists()
    assert not another.exists()


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
