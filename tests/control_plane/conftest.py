"""A cluster for the tests of this folder: one that is given, or a control plane of their own."""

import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from http import HTTPStatus
from pathlib import Path

import pytest

from local_cluster.api import Cluster
from local_cluster.binaries import BinariesUnavailableError, provide_binaries
from local_cluster.control_plane import end_control_plane, start_control_plane
from local_cluster.testing import find_kubectl, given_kubeconfig, make_tell
from stagetune_api import names
from stagetune_api.schema import CRD_FILE


@pytest.fixture(scope="session")
def cluster(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Cluster]:
    """The cluster of STAGETUNE_TEST_KUBECONFIG, else a new control plane that ends afterwards."""
    scratch = tmp_path_factory.mktemp("cluster")
    given = given_kubeconfig()
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, scratch)
        if given:
            kubeconfig, kubectl = given, find_kubectl()
        else:
            binaries = find_binaries(request.config)
            stack.callback(end_control_plane, scratch / "control-plane")
            kubeconfig = start_control_plane(binaries, scratch / "control-plane")
            kubectl = binaries / "kubectl"
        yield stack.enter_context(Cluster(kubeconfig, kubectl, scratch))


def find_binaries(config: pytest.Config) -> Path:
    """Return the folder of the control plane's programs; the first time that takes minutes."""
    try:
        return provide_binaries(make_tell(config))
    except BinariesUnavailableError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def crd(cluster: Cluster) -> Iterator[str]:
    """The CustomResourceDefinition, applied as a user would and established; its name.

    Taken away afterwards from a cluster that did not have it.
    """
    name = f"crd/{names.PLURAL}.{names.GROUP}"
    had_it = cluster.try_kubectl("get", name).returncode == 0
    cluster.kubectl("apply", "--server-side", "--force-conflicts", "-f", str(CRD_FILE))
    try:
        cluster.kubectl("wait", "--for=condition=Established", "--timeout=60s", name)
        yield name
    finally:
        if not had_it:
            cluster.delete(name)


@pytest.fixture(scope="session")
def namespace(cluster: Cluster) -> Iterator[str]:
    """A namespace of these tests; taken away afterwards without waiting for it."""
    made = cluster.request(
        "POST", "/api/v1/namespaces", {"metadata": {"generateName": "stagetune-test-"}}
    )
    assert made.status == HTTPStatus.CREATED, made.message
    name: str = made.body["metadata"]["name"]
    yield name
    cluster.request("DELETE", f"/api/v1/namespaces/{name}")
