"""containerd in a sandbox, and how images come into it."""

import json
import os
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from local_cluster.debian import Debian
from local_cluster.record import Processes
from local_cluster.sandbox import Sandbox

SOCKET = "run/containerd/containerd.sock"
"""Below the cluster's folder; a sandbox sees it below /."""
ROOT = "lib/containerd"
KUBERNETES_PLUGINS = [
    "io.containerd.cri.v1.images",
    "io.containerd.cri.v1.runtime",
    "io.containerd.grpc.v1.cri",
]
CTR_SECONDS = 1200
CAP_SYS_RESOURCE = 24
"""capabilities(7)."""
CONFIG = """\
version = 3
disabled_plugins = {disabled}
root = "/var/lib/containerd"
state = "/run/containerd"

[grpc]
address = "/run/containerd/containerd.sock"

[plugins."io.containerd.cri.v1.images".pinned_images]
sandbox = {pause_image}

[plugins."io.containerd.cri.v1.runtime"]
restrict_oom_score_adj = {restricted}

[plugins."io.containerd.cri.v1.runtime".cni]
bin_dirs = [{plugins}]
conf_dir = {network}

[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"

[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc.options]
SystemdCgroup = false
"""


class ContainerdTools(NamedTuple):
    """Where the programs are that running containerd takes."""

    containerd: Path
    """The folder of containerd's own."""
    pod: Path
    debian: Debian


class Containerd(NamedTuple):
    """The containerd of the cluster in `directory`, as seen from the machine."""

    programs: Path
    directory: Path

    def load(self, name: str, write_archive: Callable[[Path, list[str]], None]) -> None:
        """Unpack an image as `name`, from an archive that is made for the purpose and deleted.

        `write_archive` is given the path, and the digests of the blobs that it may leave out.
        """
        with tempfile.TemporaryDirectory(dir=self.directory, prefix="archive-") as scratch:
            archive = Path(scratch) / "image.tar"
            write_archive(archive, self.ctr("content", "list", "--quiet").split())
            self.ctr("images", "import", f"--index-name={name}", str(archive))

    def collect_garbage(self, name: str) -> None:
        """Remove what no image has any more, and wait: it is done with the end of a name."""
        passing = f"{name}-passing"
        self.ctr("images", "tag", name, passing)
        self.ctr("images", "remove", "--sync", passing)

    def ctr(self, *arguments: str) -> str:
        """Run ctr and return its output; raises OSError with its error if it fails."""
        done = self.try_ctr(*arguments)
        if done.returncode != 0:
            raise OSError(f"ctr {' '.join(arguments)}: {done.stderr.strip()}")
        return done.stdout

    def try_ctr(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run ctr and return what it said, whether it succeeded or not."""
        program, address = self.programs / "ctr", self.directory / SOCKET
        return subprocess.run(
            [str(program), f"--address={address}", "--namespace=k8s.io", *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=CTR_SECONDS,
        )


def start_containerd(
    tools: ContainerdTools,
    processes: Processes,
    sandbox: Sandbox,
    pause_image: str | None = None,
) -> Containerd:
    """Start containerd in the sandbox, for a kubelet if it is given an image for its pods' first
    containers; return it when it answers."""
    directory = processes.directory
    config = directory / "containerd.toml"
    # JSON's strings and lists are TOML's as well.
    config.write_text(
        CONFIG.format(
            # Kubernetes' own part gives an image names that nobody takes away from it.
            disabled=json.dumps(KUBERNETES_PLUGINS if pause_image is None else []),
            pause_image=json.dumps(pause_image or ""),
            restricted=json.dumps(not may_protect_from_the_oom_killer()),
            plugins=json.dumps(str(tools.debian.cni)),
            network=json.dumps(str(directory / "node/network")),
        )
    )
    environment = tools.debian.environment
    # It looks for its shim there.
    environment["PATH"] = os.pathsep.join([str(tools.containerd), environment["PATH"]])
    command = [*sandbox.enter, str(tools.containerd / "containerd"), f"--config={config}"]
    processes.start("containerd", command, environment)
    made = Containerd(tools.containerd, directory)
    processes.wait_until(lambda: made.try_ctr("version").returncode == 0, what="containerd")
    return made


def may_protect_from_the_oom_killer() -> bool:
    """Return whether programs started here may ask to be spared when memory runs out.

    Where they may not, every container would fail over asking.
    """
    status = Path("/proc/self/status").read_text()
    effective = next(line for line in status.splitlines() if line.startswith("CapEff:"))
    return bool(int(effective.split()[1], 16) >> CAP_SYS_RESOURCE & 1)
