"""The programs of Kubernetes: built once from their Go module, then kept in the cache.

What is in `program/` decides the folder's name, so a change of it builds anew and nothing else
does. A build goes to a folder beside it and gets its name when it is whole; `programs` and `debian`
keep what else a cluster takes in the same way.
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
    "kubelet",
    "kube-proxy",
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
    return cache_directory() / f"kubernetes-{kubernetes_version()}-{digest_of(SOURCES)}"


def digest_of(sources: Path) -> str:
    """Return what tells apart the states of a folder of sources, in twelve characters."""
    digest = hashlib.sha256()
    for path in sorted(sources.iterdir()):
        content = path.read_bytes()
        digest.update(f"{path.name} {len(content)}\n".encode() + content)
    return digest.hexdigest()[:12]


def provide_binaries(tell: Callable[[str], None]) -> Path:
    """Return the folder with the binaries, building them first where they are not there yet.

    `tell` is given what a person should know who waits. Raises BinariesUnavailableError if this
    machine cannot build them, and CalledProcessError if it can and the code does not compile.
    """
    return provide_folder(binaries_directory(), _build, tell)


def provide_folder(
    directory: Path, make: Callable[[Path, int], None], tell: Callable[[str], None]
) -> Path:
    """Return `directory`, having `make` fill it first where it is not there yet.

    `make` is given a folder beside it, and a lock to pass to every program it starts: the program
    keeps the lock for as long as it lives, also if this process is killed before it.
    """
    if not directory.exists():
        directory.parent.mkdir(parents=True, exist_ok=True)
        name = directory.name.partition("-")[0]
        with hold_lock(directory.with_name(f"{name}.lock"), tell) as lock:
            if not directory.exists():
                # What an interrupted build left: no other can be under way, for the lock is held.
                unfinished = directory.with_name(f"{directory.name}.tmp")
                shutil.rmtree(unfinished, ignore_errors=True)
                started = time.monotonic()
                unfinished.mkdir()
                try:
                    tell(f"making {directory}; minutes, and only once")
                    make(unfinished, lock)
                    unfinished.rename(directory)
                finally:
                    shutil.rmtree(unfinished, ignore_errors=True)
                tell(f"made {directory} in {time.monotonic() - started:.0f} s")
    return directory


@contextmanager
def hold_lock(path: Path, tell: Callable[[str], None]) -> Iterator[int]:
    """Hold the lock `path`, which is the kernel's and so goes with whoever holds it."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            tell(f"another process holds {path}; waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield file.fileno()


def find_go(directory: Path, needed_bytes: int) -> str:
    """Return the Go that builds for `directory`; raises BinariesUnavailableError without it or
    the disk that it takes."""
    go = shutil.which("go")
    if go is None:
        raise BinariesUnavailableError(
            "Go is not on the PATH, and it builds the test cluster; install Go 1.26 or newer, "
            "or give a cluster by STAGETUNE_TEST_KUBECONFIG"
        )
    if (free := shutil.disk_usage(directory).free) < needed_bytes:
        raise BinariesUnavailableError(
            f"building the test cluster takes {needed_bytes / 1e9:.0f} GB and {directory} "
            f"has {free / 1e9:.1f} GB left; free some, or set XDG_CACHE_HOME and GOCACHE to "
            "folders with more"
        )
    return go


def _build(unfinished: Path, lock: int) -> None:
    go = find_go(unfinished.parent, NEEDED_BYTES)
    environment = {**os.environ, "CGO_ENABLED": "0", "GOWORK": "off"}
    _download(go, environment, lock)
    command = [go, "build", "-trimpath", "-buildvcs=false", "-ldflags", _linker_flags()]
    command += ["-o", str(unfinished / "kubernetes"), "."]
    subprocess.run(command, cwd=SOURCES, env=environment, check=True, pass_fds=[lock])
    for name in PROGRAMS:
        (unfinished / name).symlink_to("kubernetes")


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
