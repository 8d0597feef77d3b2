"""What the fixtures of more than one tier need to come by a cluster."""

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from local_cluster.binaries import binaries_directory

KUBECONFIG_VARIABLE = "STAGETUNE_TEST_KUBECONFIG"


def given_kubeconfig() -> Path | None:
    """Return the kubeconfig of a cluster that whoever runs the tests has; None without one."""
    given = os.environ.get(KUBECONFIG_VARIABLE)
    return Path(given) if given else None


def find_kubectl() -> Path:
    """Return the kubectl for a cluster that is given; skips the test without one."""
    built = binaries_directory() / "kubectl"
    found = str(built) if built.exists() else shutil.which("kubectl")
    if found is None:
        pytest.skip(f"{KUBECONFIG_VARIABLE} is set and there is no kubectl; install one")
    return Path(found)


def make_tell(config: pytest.Config) -> Callable[[str], None]:
    """Return a function that tells whoever waits for the tests why, at once."""
    capture = config.pluginmanager.getplugin("capturemanager")

    def tell(text: str) -> None:
        with capture.global_and_fixture_disabled():
            print(f"\n{text}", file=sys.stderr, flush=True)  # noqa: T201

    return tell
