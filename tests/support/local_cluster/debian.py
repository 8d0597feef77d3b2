"""Programs that a node takes from Debian, unpacked into the cache and not installed.

The machine stays as it is: apt works in folders of its own, no package is set up and no service
started. The programs need their libraries' folder in LD_LIBRARY_PATH; `Debian.environment` has it.
"""

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

from local_cluster.binaries import BinariesUnavailableError, cache_directory, provide_folder

PACKAGES = (
    "runc",
    "containernetworking-plugins",
    "nftables",
    # The libraries of runc and of nft that a small Debian lacks.
    "libseccomp2",
    "libnftables1",
    "libnftnl11",
    "libmnl0",
    "libxtables12",
    "libjansson4",
    "libgmp10",
    "libedit2",
    "libbsd0",
    "libmd0",
)
APT_SECONDS = 600


class Debian(NamedTuple):
    """The unpacked packages."""

    root: Path

    @property
    def cni(self) -> Path:
        """The folder of the network plugins."""
        return self.root / "usr/lib/cni"

    @property
    def environment(self) -> dict[str, str]:
        """What a program needs that runs these."""
        usr = self.root / "usr"
        libraries = usr / "lib" / f"{platform.machine()}-linux-gnu"
        found = [f"{usr}/sbin", f"{usr}/bin", os.environ["PATH"], "/usr/sbin", "/sbin"]
        return {"PATH": os.pathsep.join(found), "LD_LIBRARY_PATH": str(libraries)}


def provide_debian(tell: Callable[[str], None]) -> Debian:
    """Return the unpacked packages, fetching them first where they are not there yet.

    Raises BinariesUnavailableError where that cannot be done.
    """
    release = platform.freedesktop_os_release()
    digest = hashlib.sha256(" ".join(PACKAGES).encode()).hexdigest()[:12]
    name = f"debian-{release.get('VERSION_ID', release['ID'])}-{digest}"
    return Debian(provide_folder(cache_directory() / name, partial(_unpack, release["ID"]), tell))


def _unpack(distribution: str, unfinished: Path, lock: int) -> None:
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        raise BinariesUnavailableError(
            f"a node's programs come from Debian's packages, and this {distribution} has no "
            "apt-get; give a cluster by STAGETUNE_TEST_KUBECONFIG"
        )
    with tempfile.TemporaryDirectory(dir=unfinished.parent, prefix="apt-") as scratch:
        folder = Path(scratch)
        (folder / "lists/partial").mkdir(parents=True)
        (folder / "cache/archives/partial").mkdir(parents=True)
        options = [f"-oDir::State::lists={folder / 'lists'}", f"-oDir::Cache={folder / 'cache'}"]
        _run(["apt-get", "--quiet", *options, "update"], folder, lock)
        _run(["apt-get", "--quiet", *options, "download", *PACKAGES], folder, lock)
        for package in sorted(folder.glob("*.deb")):
            _run(["dpkg-deb", "--extract", str(package), str(unfinished)], folder, lock)


def _run(command: list[str], folder: Path, lock: int) -> None:
    done = subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, "LC_ALL": "C"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=APT_SECONDS,
        pass_fds=[lock],
    )
    if done.returncode != 0:
        last = done.stdout.strip().rpartition("\n")[2]
        raise BinariesUnavailableError(
            f"{command[0]} cannot get a node's programs ({last}); they come from the mirrors in "
            "this machine's apt sources, or give a cluster by STAGETUNE_TEST_KUBECONFIG"
        )
