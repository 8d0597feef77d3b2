"""Programs beside Kubernetes' own: each built once from its Go module, then kept in the cache.

The version is in the folder's name. Each is provided by itself, for most tests want one of them:
Helm and promtool check what is never deployed, and a node wants containerd and CoreDNS.
"""

import os
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

from local_cluster.binaries import (
    BinariesUnavailableError,
    cache_directory,
    digest_of,
    find_go,
    provide_folder,
)

Tell = Callable[[str], None]
POD_PROGRAM = Path(__file__).parent / "pod_program"


class GoProgram(NamedTuple):
    """Commands of one public Go module, which its checksum database vouches for."""

    name: str
    """What the folder in the cache begins with."""
    module: str
    version: str
    packages: tuple[str, ...]
    """Of the commands, below the module's own; `.` is the module's own."""
    linker_values: tuple[str, ...] = ()
    """What the makers' own builds set at link time and a program says when asked for."""
    tags: str = ""
    needed_bytes: int = 3 * 10**9
    """The modules and Go's build cache; the four together took 9 GB."""


CONTAINERD = GoProgram(
    "containerd",
    "github.com/containerd/containerd/v2",
    "v2.4.2",
    ("cmd/containerd", "cmd/containerd-shim-runc-v2", "cmd/ctr"),
    ("github.com/containerd/containerd/v2/version.Version=v2.4.2",),
)
COREDNS = GoProgram("coredns", "github.com/coredns/coredns", "v1.15.0", (".",))
HELM = GoProgram(
    "helm",
    "helm.sh/helm/v4",
    "v4.3.1",
    ("cmd/helm",),
    ("helm.sh/helm/v4/internal/version.version=v4.3.1",),
)
PROMETHEUS = GoProgram(
    "prometheus",
    "github.com/prometheus/prometheus",
    "v0.316.0",  # 3.16.0, as its Go module counts
    ("cmd/prometheus", "cmd/promtool"),
    ("github.com/prometheus/common/version.Version=3.16.0",),
    # Service discovery in twenty clouds is most of what there is to compile.
    "remove_all_sd,enable_kubernetes_sd",
)


def provide_containerd(tell: Tell) -> Path:
    """Return the folder with containerd, its shim for runc, and ctr."""
    return _provide(CONTAINERD, tell)


def provide_coredns(tell: Tell) -> Path:
    """Return the path of CoreDNS."""
    return _provide(COREDNS, tell) / "coredns"


def provide_helm(tell: Tell) -> Path:
    """Return the path of Helm."""
    return _provide(HELM, tell) / "helm"


def provide_prometheus(tell: Tell) -> Path:
    """Return the folder with prometheus, which has no web pages here, and promtool."""
    return _provide(PROMETHEUS, tell)


def provide_pod_program(tell: Tell) -> Path:
    """Return the path of the program that `pod_program/` is the source of."""
    directory = cache_directory() / f"pod-{digest_of(POD_PROGRAM)}"
    return provide_folder(directory, _build_pod_program, tell) / "pod"


def _build_pod_program(unfinished: Path, lock: int) -> None:
    go = find_go(unfinished.parent, 10**8)
    command = [go, "build", "-trimpath", "-buildvcs=false", "-ldflags", "-s -w"]
    subprocess.run(
        [*command, "-o", str(unfinished / "pod"), "."],
        cwd=POD_PROGRAM,
        env={**os.environ, "CGO_ENABLED": "0", "GOWORK": "off"},
        check=True,
        pass_fds=[lock],
    )


def _provide(program: GoProgram, tell: Tell) -> Path:
    """Return the program's folder, or raise BinariesUnavailableError with the cure."""
    directory = cache_directory() / f"{program.name}-{program.version}"
    return provide_folder(directory, partial(_install, program), tell)


def _install(program: GoProgram, unfinished: Path, lock: int) -> None:
    go = find_go(unfinished.parent, program.needed_bytes)
    flags = " ".join(["-s", "-w", *(f"-X {value}" for value in program.linker_values)])
    root = program.module
    paths = [root if package == "." else f"{root}/{package}" for package in program.packages]
    command = [go, "install", "-trimpath", "-ldflags", flags, "-tags", program.tags]
    done = subprocess.run(
        [*command, *(f"{path}@{program.version}" for path in paths)],
        env={**os.environ, "CGO_ENABLED": "0", "GOWORK": "off", "GOBIN": str(unfinished)},
        stderr=subprocess.PIPE,
        text=True,
        check=False,
        pass_fds=[lock],
    )
    if done.returncode != 0:
        last = done.stderr.strip().rpartition("\n")[2]
        raise BinariesUnavailableError(
            f"Go cannot build {program.name} {program.version} ({last}); it takes Go 1.26.7 or "
            "newer and a module proxy that can be reached (GOPROXY)"
        )
