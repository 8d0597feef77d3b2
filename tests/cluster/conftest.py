"""A cluster that runs pods: one that is given, or a control plane and a node of their own."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from http import HTTPStatus
from pathlib import Path

import pytest

from local_cluster.api import Cluster
from local_cluster.binaries import BinariesUnavailableError
from local_cluster.node import NodePrograms, provide_node_programs, why_no_node
from local_cluster.node_cluster import (
    end_cluster,
    end_leftovers,
    own_directory,
    start_node_cluster,
)
from local_cluster.testing import find_kubectl, given_kubeconfig, make_tell


@pytest.fixture(scope="session")
def tell(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """What tells whoever waits for the tests why."""
    return make_tell(request.config)


@pytest.fixture(scope="session")
def node_programs(tell: Callable[[str], None]) -> NodePrograms:
    """The programs of a cluster with a node; the first time that takes minutes."""
    if reason := why_no_node():
        pytest.skip(reason)
    try:
        return provide_node_programs(tell)
    except BinariesUnavailableError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def node_directory(
    request: pytest.FixtureRequest, tell: Callable[[str], None]
) -> Iterator[Path | None]:
    """The folder of the tests' own cluster with a node; None where a cluster is given."""
    if given_kubeconfig():
        yield None
        return
    programs: NodePrograms = request.getfixturevalue("node_programs")
    end_leftovers()
    directory = own_directory("tests")
    try:
        start_node_cluster(programs, directory, tell)
        yield directory
    finally:
        end_cluster(directory)


@pytest.fixture(scope="session")
def node_cluster(
    request: pytest.FixtureRequest,
    node_directory: Path | None,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Cluster]:
    """The cluster of STAGETUNE_TEST_KUBECONFIG, else a new one with a node that ends afterwards.

    A new one has a GPU for the scheduler and volumes for claims of any access mode.
    """
    with ExitStack() as stack:
        if node_directory is None:
            kubeconfig, kubectl = given_kubeconfig(), find_kubectl()
            assert kubeconfig is not None
        else:
            programs: NodePrograms = request.getfixturevalue("node_programs")
            kubeconfig = node_directory / "kubeconfig.json"
            kubectl = programs.kubernetes / "kubectl"
        scratch = tmp_path_factory.mktemp("cluster")
        yield stack.enter_context(Cluster(kubeconfig, kubectl, scratch))


@pytest.fixture
def restricted_namespace(node_cluster: Cluster) -> Iterator[str]:
    """A namespace of one test that takes only pods of Pod Security's level `restricted`."""
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    metadata = {"generateName": "stagetune-test-", "labels": labels}
    made = node_cluster.request("POST", "/api/v1/namespaces", {"metadata": metadata})
    assert made.status == HTTPStatus.CREATED, made.message
    name: str = made.body["metadata"]["name"]
    yield name
    node_cluster.request("DELETE", f"/api/v1/namespaces/{name}")
