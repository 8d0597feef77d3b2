"""The programs of the control plane: built once from their Go module, then kept in the cache.

What is in `program/` decides the folder's name, so a change of it builds anew and nothing else
does. A build goes to a folder beside it and gets its name when it is whole.
"""

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

PROGRAMS = (
    "etcd",
    "kube-apiserver",
    "kube-controller-manager",
    "kube-scheduler",
    "kubectl",
    "certificates",
)
SOURCES = Path(__file__).parent / "program"
VERSION_PACKAGE = "k8s.io/component-base/version"
NEEDED_BYTES = 6 * 10**9
"""The modules, Go's build cache and the program; 4.8 GB when it was last measured."""


class BinariesUnavailableError(Exception):
    """This machine has no binaries and cannot build them; the text says why and what helps."""


def cache_directory() -> Path:
    """Return the folder of everything that Stagetune keeps between checkouts."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "stagetune"


def kubernetes_version() -> str:
    """Return the version of Kubernetes that go.mod asks for, as `v1.37.2`."""
    found = re.search(r"^\tk8s\.io/kubernetes (v\S+)$", (SOURCES / "go.mod").read_text(), re.M)
    if found is None:
        raise ValueError(f"{SOURCES / 'go.mod'} does not require k8s.io/kubernetes")
    return found[1]


def binaries_directory() -> Path:
    """Return the folder in which the binaries are, or will be once they are built."""
    digest = hashlib.sha256()
    for path in sorted(SOURCES.iterdir()):
        content = path.read_bytes()
        digest.update(f"{path.name} {len(content)}\n".encode() + content)
    return cache_directory() / f"kubernetes-{kubernetes_version()}-{digest.hexdigest()[:12]}"


def provide_binaries(tell: Callable[[str], None]) -> Path:
    """Return the folder with the binaries, building them first where they are not there yet.

    `tell` is given what a person should know who waits. Raises BinariesUnavailableError if this
    machine cannot build them, and CalledProcessError if it can and the code does not compile.
    """
    directory = binaries_directory()
    if not directory.exists():
        directory.parent.mkdir(parents=True, exist_ok=True)
        with _lock(directory.parent / "kubernetes.lock", tell) as lock:
            if not directory.exists():
                _build(directory, lock, tell)
    return directory


@contextmanager
def _lock(path: Path, tell: Callable[[str], None]) -> Iterator[int]:
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            tell("another process builds Kubernetes; waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield file.fileno()


def _build(directory: Path, lock: int, tell: Callable[[str], None]) -> None:
    go = shutil.which("go")
    if go is None:
        raise BinariesUnavailableError(
            "Go is not on the PATH, and it builds the test cluster; install Go 1.26 or newer, "
            "or give a cluster by STAGETUNE_TEST_KUBECONFIG"
        )
    if (free := shutil.disk_usage(directory.parent).free) < NEEDED_BYTES:
        raise BinariesUnavailableError(
            f"building the test cluster takes {NEEDED_BYTES / 1e9:.0f} GB and {directory.parent} "
            f"has {free / 1e9:.1f} GB left; free some, or set XDG_CACHE_HOME and GOCACHE to "
            "folders with more"
        )
    tell(f"building Kubernetes {kubernetes_version()} for {directory}; minutes, and only once")
    started = time.monotonic()
    # What an interrupted build left: no other build can be under way, for the lock is held.
    unfinished = directory.with_name(f"{directory.name}.tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    environment = {**os.environ, "CGO_ENABLED": "0", "GOWORK": "off"}
    _download(go, environment, lock)
    command = [go, "build", "-trimpath", "-buildvcs=false", "-ldflags", _linker_flags()]
    command += ["-o", str(unfinished / "kubernetes"), "."]
    # Go keeps the lock for as long as it lives, also if this process is killed before it.
    subprocess.run(command, cwd=SOURCES, env=environment, check=True, pass_fds=[lock])
    for name in PROGRAMS:
        (unfinished / name).symlink_to("kubernetes")
    unfinished.rename(directory)
    tell(f"built in {time.monotonic() - started:.0f} s")


def _download(go: str, environment: Mapping[str, str], lock: int) -> None:
    """Fetch what the build needs: the step that fails for reasons outside this repository."""
    listed = subprocess.run(
        [go, "list", "-deps", "."],
        cwd=SOURCES,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
        pass_fds=[lock],
    )
    if listed.returncode != 0:
        last = listed.stderr.strip().rpartition("\n")[2]
        raise BinariesUnavailableError(
            f"Go cannot get the modules of the test cluster ({last}); it takes Go 1.26 or newer "
            "and a module proxy that can be reached (GOPROXY), or give a cluster by "
            "STAGETUNE_TEST_KUBECONFIG"
        )


def _linker_flags() -> str:
    version = kubernetes_version()
    major, minor, _ = version.removeprefix("v").split(".", 2)
    values = {"gitVersion": version, "gitMajor": major, "gitMinor": minor, "gitTreeState": "clean"}
    # Without the symbol tables (-s -w) the program is a third smaller.
    return " ".join(
        ["-s", "-w", *(f"-X {VERSION_PACKAGE}.{key}={value}" for key, value in values.items())]
    )
