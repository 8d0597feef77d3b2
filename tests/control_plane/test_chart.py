"""The chart with the real Helm on a real API server: what is installed, who may what, what stays.

The server is this file's own and never one that is given: the tests install, upgrade and uninstall
what is one for a whole cluster, and uninstalling takes every run along if something is wrong.
"""

import http.client
import json
import os
import re
import runpy
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from http import HTTPStatus
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from fake_cluster import report_for
from local_cluster.api import Answer, Cluster
from local_cluster.binaries import BinariesUnavailableError, provide_binaries
from local_cluster.control_plane import end_control_plane, start_control_plane
from local_cluster.processes import wait_until
from local_cluster.programs import provide_helm
from local_cluster.testing import make_tell
from local_cluster.volumes import make_storage
from manifest_cases import edited
from operator_process import OperatorProcess
from pod_programs import Ended, NeverStarts, Program, Runs
from stagetune_api import names
from stagetune_api.spec import StagedFineTune
from stagetune_api.stage import StageConfig
from stagetune_api.validation import parse_manifest
from stagetune_operator.manifests import build_job
from stagetune_operator.ownership import Owner
from stagetune_operator.pod_template import JobOrder
from stagetune_operator.settings import Settings
from stagetune_operator.stage_files import PREPARE, build_stage_file
from stand_in_kubelet import StandInKubelet

pytestmark = pytest.mark.control_plane

Object = dict[str, Any]
Right = tuple[str, str, str]
"""A group, a resource with its subresource, and a verb."""

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "charts" / "stagetune"
CRD = f"crd/{names.PLURAL}.{names.GROUP}"
MANIFESTS = ROOT / "deploy" / "stagetune.yaml"
QUICK_START = ROOT / "examples" / "quickstart"
RENDER = runpy.run_path(str(ROOT / "deploy" / "render.py"))
YAML_1_2 = YAML(typ="safe", pure=True)
SYSTEM, TEAM, OTHER = "stagetune-system", "team-a", "team-b"
SECONDS = 60
RESTRICTED = {"pod-security.kubernetes.io/enforce": "restricted"}
NAMESPACED = {"watchNamespaces": [TEAM]}
EVERYTHING_ON: Object = {
    "watchNamespaces": [TEAM, OTHER],
    "commonLabels": {"team": "platform"},
    "crds": {"annotations": {"example.com/kept-by": "hand"}},
    "image": {"digest": "sha256:" + "a" * 64},
    "imagePullSecrets": [{"name": "pull"}],
    "trainer": {"imagePullSecrets": [{"name": "pull"}, {"name": "other"}]},
    "extraEnv": [{"name": "HTTPS_PROXY", "value": "http://proxy.example:3128"}],
    "podAnnotations": {"example.com/a": "b"},
    "podLabels": {"example.com/c": "d"},
    "nodeSelector": {"kubernetes.io/os": "linux"},
    "tolerations": [{"key": "infra", "operator": "Exists"}],
    "affinity": {"nodeAffinity": {}},
    "metrics": {
        "serviceMonitor": {"enabled": True, "labels": {"release": "prometheus"}},
        "podMonitor": {"enabled": True, "interval": "30s"},
    },
    "networkPolicy": {
        "enabled": True,
        "metricsFrom": [{"namespaceSelector": {"matchLabels": {"team": "platform"}}}],
        "hubPorts": [443, 3128],
        "trainerEgress": [{"ports": [{"port": 9000, "protocol": "TCP"}]}],
    },
}
OPERATOR_RIGHTS: set[Right] = {
    (names.GROUP, names.PLURAL, "get"),
    (names.GROUP, names.PLURAL, "list"),
    (names.GROUP, names.PLURAL, "watch"),
    (names.GROUP, f"{names.PLURAL}/status", "update"),
    (names.GROUP, f"{names.PLURAL}/finalizers", "update"),
    ("batch", "jobs", "list"),
    ("batch", "jobs", "watch"),
    ("batch", "jobs", "create"),
    ("batch", "jobs", "delete"),
    ("", "pods", "list"),
    ("", "pods", "watch"),
    ("", "configmaps", "get"),
    ("", "configmaps", "create"),
    ("", "persistentvolumeclaims", "get"),
    ("", "persistentvolumeclaims", "create"),
    ("", "services", "get"),
    ("", "services", "create"),
    ("", "events", "create"),
}
REVIEW: Right = ("authentication.k8s.io", "tokenreviews", "create")


class Helm:
    """The real Helm, for one cluster and with folders of its own."""

    def __init__(self, program: Path, kubeconfig: Path, scratch: Path) -> None:
        self.program = program
        homes = {f"HELM_{what}_HOME": str(scratch / what) for what in ("CACHE", "CONFIG", "DATA")}
        self._environment = {**os.environ, **homes, "KUBECONFIG": str(kubeconfig)}

    def try_run(
        self, *arguments: str, values: Object | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run Helm and return what it said, whether it succeeded or not."""
        given = [] if values is None else ["--values=-"]
        return subprocess.run(
            [str(self.program), *arguments, *given],
            input=json.dumps(values),
            env=self._environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )

    def run(self, *arguments: str, values: Object | None = None) -> str:
        """Run Helm and return its output; it has to succeed and to warn of nothing."""
        done = self.try_run(*arguments, values=values)
        assert done.returncode == 0, done.stderr
        assert "warn" not in done.stderr.lower(), done.stderr
        return done.stdout

    def objects(self, values: Object | None = None, *, chart: Path = CHART) -> list[Object]:
        """Return the objects that the chart makes with `values`."""
        text = self.run("template", "stagetune", str(chart), f"-n={SYSTEM}", values=values or {})
        return [item for item in YAML_1_2.load_all(text) if item is not None]


@pytest.fixture(scope="module")
def cluster(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Cluster]:
    """A control plane of this file's own, with the namespaces."""
    scratch = tmp_path_factory.mktemp("chart")
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, scratch)
        try:
            binaries = provide_binaries(make_tell(request.config))
        except BinariesUnavailableError as error:
            pytest.skip(str(error))
        stack.callback(end_control_plane, scratch / "control-plane")
        kubeconfig = start_control_plane(binaries, scratch / "control-plane")
        made = stack.enter_context(Cluster(kubeconfig, binaries / "kubectl", scratch))
        for name in (SYSTEM, TEAM, OTHER):
            made.kubectl("create", "namespace", name)
            labels = [f"{label}={value}" for label, value in RESTRICTED.items()]
            made.kubectl("label", "namespace", name, *labels)
        yield made


@pytest.fixture(scope="module")
def helm_program(request: pytest.FixtureRequest) -> Path:
    try:
        return provide_helm(make_tell(request.config))
    except BinariesUnavailableError as error:
        pytest.skip(str(error))


@pytest.fixture
def helm(helm_program: Path, cluster: Cluster, tmp_path: Path) -> Helm:
    """Helm for the cluster."""
    return Helm(helm_program, cluster.kubeconfig, tmp_path / "helm")


@pytest.fixture
def offline_helm(helm_program: Path, tmp_path: Path) -> Helm:
    """Helm without a cluster."""
    return Helm(helm_program, tmp_path / "no-kubeconfig", tmp_path / "helm")


Install = Callable[..., str]


@pytest.fixture
def install(helm: Helm, cluster: Cluster) -> Iterator[Install]:
    """Installs the chart, and takes it away afterwards with what it keeps; returns its notes."""

    def run(values: Object | None = None) -> str:
        where = ["stagetune", str(CHART), f"-n={SYSTEM}"]
        return helm.run("install", *where, values=values or {})

    try:
        yield run
    finally:
        helm.try_run("uninstall", "stagetune", f"-n={SYSTEM}", "--wait")
        cluster.delete(CRD)


def listed(cluster: Cluster, *arguments: str) -> list[Object]:
    """Return what `kubectl get` finds."""
    found: list[Object] = json.loads(cluster.kubectl("get", *arguments, "-o=json"))["items"]
    return found


def of_kind(objects: list[Object], kind: str) -> dict[str, Object]:
    return {
        f"{item['metadata'].get('namespace', '')}/{item['metadata']['name']}": item
        for item in objects
        if item["kind"] == kind
    }


# What needs no server


@pytest.mark.parametrize("values", [{}, EVERYTHING_ON], ids=["defaults", "everything on"])
def test_helm_lint_finds_nothing(values: Object, offline_helm: Helm) -> None:
    said = offline_helm.run("lint", "--strict", str(CHART), values=values)
    assert "1 chart(s) linted, 0 chart(s) failed" in said


def test_the_manifests_for_kubectl_are_a_fresh_rendering(helm_program: Path) -> None:
    fresh = RENDER["render_manifests"](helm_program)
    assert MANIFESTS.read_text() == fresh, "make manifests writes it anew"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"watchNamespace": [TEAM]}, "additional properties 'watchNamespace' not allowed"),
        ({"image": {"tga": "1"}}, "at '/image': additional properties 'tga' not allowed"),
        ({"log": {"level": "info"}}, "at '/log/level': value must be one of 'DEBUG', 'INFO'"),
        ({"watchNamespaces": TEAM}, "at '/watchNamespaces': got string, want array"),
        (
            {"extraEnv": [{"name": "STAGETUNE_WORKERS", "value": "2"}]},
            "extraEnv: STAGETUNE_WORKERS is a setting of the operator",
        ),
    ],
)
def test_a_wrong_value_is_refused_by_its_place(
    values: Object, message: str, offline_helm: Helm
) -> None:
    done = offline_helm.try_run("template", str(CHART), values=values)
    assert done.returncode != 0
    assert message in done.stderr


def test_a_chart_that_has_this_one_as_a_part_gives_it_global_values(offline_helm: Helm) -> None:
    assert offline_helm.objects({"global": {"region": "north"}}) == offline_helm.objects()


def test_the_crd_is_the_original_with_the_labels_of_a_release(offline_helm: Helm) -> None:
    annotations = {"example.com/kept-by": "hand"}
    objects = offline_helm.objects({"crds": {"annotations": annotations}})
    (found,) = of_kind(objects, "CustomResourceDefinition").values()
    keep = {"helm.sh/resource-policy": "keep"}
    assert found["metadata"].pop("annotations") == {**annotations, **keep}
    assert found["metadata"].pop("labels")["app.kubernetes.io/managed-by"] == "Helm"
    assert found == YAML_1_2.load(RENDER["CRD"].read_text())

    (found,) = of_kind(
        offline_helm.objects({"crds": {"keep": False}}), "CustomResourceDefinition"
    ).values()
    assert "annotations" not in found["metadata"]
    assert not of_kind(offline_helm.objects({"crds": {"enabled": False}}), found["kind"])


def test_an_install_for_one_namespace_can_do_without_anything_of_the_whole_cluster(
    offline_helm: Helm,
) -> None:
    values = {
        "watchNamespaces": [TEAM],
        "crds": {"enabled": False},
        "rbac": {"aggregateClusterRoles": False},
        "progress": {"enabled": False},
    }
    objects = offline_helm.objects(values)
    assert {item["metadata"]["namespace"] for item in objects} == {SYSTEM, TEAM}
    assert not of_kind(objects, "Service").keys() & {f"{SYSTEM}/stagetune-progress"}
    (deployment,) = of_kind(objects, "Deployment").values()
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    assert "STAGETUNE_PROGRESS_URL" not in [entry["name"] for entry in container["env"]]


def test_images_go_by_digest_before_tag(offline_helm: Helm) -> None:
    digest = "sha256:" + "b" * 64
    values = {
        "image": {"repository": "registry.example:5000/operator", "tag": "2.0"},
        "trainer": {"image": {"repository": "registry.example/t", "tag": "2", "digest": digest}},
    }
    (deployment,) = of_kind(offline_helm.objects(values), "Deployment").values()
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    assert container["image"] == "registry.example:5000/operator:2.0"
    image = {"name": "STAGETUNE_TRAINER_IMAGE", "value": f"registry.example/t@{digest}"}
    assert image in container["env"]


def test_monitors_select_what_there_is_by_the_labels_that_are_given(offline_helm: Helm) -> None:
    objects = offline_helm.objects(EVERYTHING_ON)
    (service_monitor,) = of_kind(objects, "ServiceMonitor").values()
    assert service_monitor["metadata"]["labels"]["release"] == "prometheus"
    wanted = service_monitor["spec"]["selector"]["matchLabels"].items()
    services = of_kind(objects, "Service").values()
    (service,) = [item for item in services if wanted <= item["metadata"]["labels"].items()]
    (endpoint,) = service_monitor["spec"]["endpoints"]
    assert [endpoint["port"]] == [port["name"] for port in service["spec"]["ports"]]
    assert endpoint["honorLabels"]

    (pod_monitor,) = of_kind(objects, "PodMonitor").values()
    labels = trainer_job()["spec"]["template"]["metadata"]["labels"]
    assert pod_monitor["spec"]["selector"]["matchLabels"].items() <= labels.items()
    assert pod_monitor["spec"]["namespaceSelector"] == {"matchNames": [TEAM, OTHER]}
    (endpoint,) = pod_monitor["spec"]["podMetricsEndpoints"]
    (container,) = trainer_job()["spec"]["template"]["spec"]["containers"]
    assert [endpoint["port"]] == [port["name"] for port in container["ports"]]
    assert endpoint["interval"] == "30s"


def test_policies_close_trainers_to_all_but_names_progress_and_scrapes(
    offline_helm: Helm,
) -> None:
    objects = offline_helm.objects({"networkPolicy": {"enabled": True}, **NAMESPACED})
    policies = of_kind(objects, "NetworkPolicy")
    where = [f"{SYSTEM}/stagetune", f"{TEAM}/stagetune-prepare", f"{TEAM}/stagetune-trainer"]
    assert sorted(policies) == where
    operator, prepare, trainer = (policies[name]["spec"] for name in where)
    labels = trainer_job()["spec"]["template"]["metadata"]["labels"]
    (deployment,) = of_kind(objects, "Deployment").values()
    operator_labels = deployment["spec"]["template"]["metadata"]["labels"]

    assert trainer["podSelector"]["matchLabels"].items() <= labels.items()
    assert trainer["policyTypes"] == ["Ingress", "Egress"]
    among, scrapes = trainer["ingress"]
    assert among == {"from": [{"podSelector": trainer["podSelector"]}]}
    assert scrapes == {"ports": [tcp(names.TRAINER_METRICS_PORT)]}
    others, dns, progress = trainer["egress"]
    assert others == {"to": [{"podSelector": trainer["podSelector"]}]}
    assert dns == {"ports": [{"port": 53, "protocol": "UDP"}, tcp(53)]}
    assert progress["ports"] == [tcp(names.OPERATOR_PROGRESS_PORT)]
    (to,) = progress["to"]
    assert to["namespaceSelector"]["matchLabels"] == {"kubernetes.io/metadata.name": SYSTEM}
    assert to["podSelector"]["matchLabels"].items() <= operator_labels.items()

    assert prepare["podSelector"]["matchLabels"].items() <= labels.items()
    assert prepare["podSelector"]["matchLabels"][names.LABEL_TASK] == names.PREPARE_TASK
    assert prepare["policyTypes"] == ["Egress"]
    assert prepare["egress"] == [{"ports": [tcp(443)]}]

    assert operator["podSelector"]["matchLabels"].items() <= operator_labels.items()
    assert operator["policyTypes"] == ["Ingress"]
    posts, scrapes = operator["ingress"]
    assert posts["ports"] == [tcp(names.OPERATOR_PROGRESS_PORT)]
    assert posts["from"][0]["podSelector"] == trainer["podSelector"]
    assert scrapes == {"ports": [tcp(names.OPERATOR_METRICS_PORT)]}


def tcp(port: int) -> Object:
    return {"port": port, "protocol": "TCP"}


# What is installed


@pytest.mark.parametrize(
    "values",
    [{}, {**EVERYTHING_ON, "metrics": {}}],
    ids=["defaults", "everything on"],
)
def test_everything_is_accepted_and_the_operators_pod_is_restricted(
    values: Object, install: Install, cluster: Cluster
) -> None:
    install(values)
    pod = operators_pod(cluster)
    assert pod["spec"]["serviceAccountName"] == "stagetune"
    refused = {"type": "ReplicaFailure", "status": "True"}
    (deployment,) = listed(cluster, "deployments", f"-n={SYSTEM}")
    assert not [
        item for item in deployment["status"]["conditions"] if refused.items() <= item.items()
    ]


def operators_pod(cluster: Cluster) -> Object:
    """Return the pod that the controllers have made of the Deployment, past admission."""
    found: list[Object] = []

    def is_there() -> bool:
        pods = listed(cluster, "pods", f"-n={SYSTEM}")
        found[:] = [pod for pod in pods if "deletionTimestamp" not in pod["metadata"]]
        return bool(found)

    wait_until(is_there, what="pod of the operator", seconds=SECONDS)
    return found[0]


def test_the_notes_show_a_manifest_that_is_accepted_and_what_is_off(
    install: Install, cluster: Cluster
) -> None:
    notes = install(NAMESPACED)
    shown = notes.partition("<<END\n")[2].partition("    END")[0]
    said = cluster.kubectl("apply", "--dry-run=server", f"-n={TEAM}", "-f-", stdin=shown)
    assert said == f"{names.SINGULAR}.{names.GROUP}/my-run created (server dry run)\n"
    off = notes.partition("Off in this release:\n")[2]
    named = [line[2:].partition(":")[0] for line in off.splitlines() if line.startswith("- ")]
    assert named == [
        "metrics.serviceMonitor.enabled",
        "metrics.podMonitor.enabled",
        "networkPolicy.enabled",
        "trainer.image.digest",
    ]


def test_the_life_of_a_release(
    helm: Helm, install: Install, cluster: Cluster, tmp_path: Path
) -> None:
    """An older CRD is brought up to date, a run outlives an uninstall, and nothing else does."""
    before = everything(cluster)
    older = tmp_path / "stagetune"
    shutil.copytree(CHART, older)
    crd = older / "files" / RENDER["CRD"].name
    crd.write_text(crd.read_text().replace("        - name: Queue\n", "        - name: Line\n"))
    where = ["stagetune", f"-n={SYSTEM}"]
    helm.run("install", where[0], str(older), where[1])
    assert "Line" in columns(cluster)
    cluster.kubectl("wait", "--for=condition=Established", "--timeout=60s", CRD)
    run = json.dumps(a_run("outlives"))
    cluster.kubectl("create", f"-n={TEAM}", "-f-", stdin=run)

    helm.run("upgrade", where[0], str(CHART), where[1])
    assert "Line" not in columns(cluster)
    assert "Queue" in columns(cluster)

    said = helm.run("uninstall", *where, "--wait")
    assert names.PLURAL in said
    cluster.kubectl("wait", "--for=delete", "pods", "--all", f"-n={SYSTEM}", "--timeout=60s")
    kept = {CRD.replace("crd/", "customresourcedefinition.apiextensions.k8s.io/")}
    assert everything(cluster) - before == kept
    assert listed(cluster, names.PLURAL, f"-n={TEAM}")

    install()
    assert cluster.kubectl("get", names.PLURAL, f"-n={TEAM}", "-o=name")
    cluster.kubectl("delete", names.PLURAL, "--all", f"-n={TEAM}")


def test_a_crd_of_kubectls_is_taken_over(helm: Helm, install: Install, cluster: Cluster) -> None:
    older = RENDER["CRD"].read_text().replace("        - name: Queue\n", "        - name: Line\n")
    cluster.kubectl("apply", "--server-side", "-f-", stdin=older)
    where = ["stagetune", str(CHART), f"-n={SYSTEM}"]
    refused = helm.try_run("install", *where)
    assert refused.returncode != 0
    assert "invalid ownership metadata" in refused.stderr
    helm.run("install", *where, "--take-ownership", "--force-conflicts")
    assert "Queue" in columns(cluster)
    helm.run("upgrade", *where, "--reset-then-reuse-values")


def columns(cluster: Cluster) -> list[str]:
    (version,) = json.loads(cluster.kubectl("get", CRD, "-o=json"))["spec"]["versions"]
    return [column["name"] for column in version["additionalPrinterColumns"]]


def everything(cluster: Cluster) -> set[str]:
    """Return the names of all that a chart could leave, in the cluster and in the namespaces."""
    kinds = cluster.kubectl("api-resources", "--verbs=list", "--namespaced=false", "-o=name")
    # Of the server's own making, at any time.
    fleeting = {"apiservices.apiregistration.k8s.io", "componentstatuses"}
    wide = ",".join(sorted(set(kinds.split()) - fleeting))
    found = set(cluster.kubectl("get", wide, "-o=name").split())
    kinds = cluster.kubectl("api-resources", "--verbs=list", "--namespaced=true", "-o=name")
    ours = {kind for kind in kinds.split() if not kind.startswith(("events", names.PLURAL))}
    for namespace in (SYSTEM, TEAM, OTHER):
        said = cluster.kubectl("get", ",".join(sorted(ours)), f"-n={namespace}", "-o=name")
        found |= {f"{namespace}: {name}" for name in said.split()}
    return found


def test_the_manifests_for_kubectl_are_accepted(cluster: Cluster, helm: Helm) -> None:
    crds = ["--server-side", "-f", str(RENDER["CRD"].parent)]
    try:
        cluster.kubectl("apply", *crds)
        done = cluster.try_kubectl("apply", "-f", str(MANIFESTS))
        assert done.returncode == 0, done.stderr
        # The namespaces are there already, and kubectl says so of those that it did not make.
        assert "would violate PodSecurity" not in done.stderr
        operators_pod(cluster)
        assert rights(cluster, TEAM) == {*OPERATOR_RIGHTS, REVIEW}
    finally:
        without_namespace = "---\n".join(MANIFESTS.read_text().split("---\n")[1:])
        cluster.kubectl("delete", "--ignore-not-found", "-f-", stdin=without_namespace)
        cluster.delete(CRD)


# Who may do what


def rights(cluster: Cluster, namespace: str, account: str = f"{SYSTEM}:stagetune") -> set[Right]:
    """Return what the account may do in `namespace` beyond what every account may."""

    def listed_for(user: str) -> set[Right]:
        review = {
            "apiVersion": "authorization.k8s.io/v1",
            "kind": "SelfSubjectRulesReview",
            "spec": {"namespace": namespace},
        }
        # Validating would have kubectl look at CRDs, which few accounts may.
        options = ["-f-", "-o=json", "--validate=false", f"--as=system:serviceaccount:{user}"]
        said = cluster.kubectl("create", *options, stdin=json.dumps(review))
        status = json.loads(said)["status"]
        assert not status["incomplete"]
        return {
            (group, resource, verb)
            for rule in status["resourceRules"]
            for group in rule["apiGroups"]
            for resource in rule["resources"]
            for verb in rule["verbs"]
        }

    return listed_for(account) - listed_for(f"{OTHER}:nobody")


def may(cluster: Cluster, verb: str, resource: str, namespace: str) -> bool:
    who = f"--as=system:serviceaccount:{SYSTEM}:stagetune"
    return cluster.try_kubectl("auth", "can-i", verb, resource, who, f"-n={namespace}").stdout == (
        "yes\n"
    )


@pytest.mark.parametrize("mode", [NAMESPACED, {}], ids=["one namespace", "cluster-wide"])
def test_the_operator_has_the_rights_that_it_needs_and_no_other(
    mode: Object, install: Install, cluster: Cluster
) -> None:
    install(mode)
    served = [TEAM] if mode else [TEAM, OTHER, SYSTEM]
    for namespace in (TEAM, OTHER, SYSTEM):
        expected = OPERATOR_RIGHTS if namespace in served else set()
        assert rights(cluster, namespace) == {*expected, REVIEW}, namespace
        assert may(cluster, "create", "jobs.batch", namespace) is (namespace in served)
        for verb, resource in (
            ("get", "secrets"),
            ("list", "secrets"),
            ("create", "pods"),
            ("create", "pods/exec"),
            ("get", "pods/log"),
            ("get", "nodes"),
            ("create", "serviceaccounts/token"),
            ("update", f"{names.PLURAL}.{names.GROUP}"),
            ("patch", "jobs.batch"),
            ("update", "configmaps"),
            ("delete", "persistentvolumeclaims"),
            ("list", "namespaces"),
            ("create", "rolebindings.rbac.authorization.k8s.io"),
        ):
            assert not may(cluster, verb, resource, namespace), (verb, resource)


def test_without_progress_no_token_is_reviewed(install: Install, cluster: Cluster) -> None:
    install({**NAMESPACED, "progress": {"enabled": False}})
    assert rights(cluster, TEAM) == OPERATOR_RIGHTS
    assert rights(cluster, OTHER) == set()


def test_people_may_do_with_runs_what_they_may_in_the_namespace(
    install: Install, cluster: Cluster
) -> None:
    install()
    accounts = {}
    for role in ("view", "edit"):
        cluster.kubectl("create", "serviceaccount", role, f"-n={TEAM}")
        account = accounts[role] = f"{TEAM}:{role}"
        bind = [f"--clusterrole={role}", f"--serviceaccount={account}", f"-n={TEAM}"]
        cluster.kubectl("create", "rolebinding", role, *bind)
    read = {
        (names.GROUP, f"{names.PLURAL}{part}", verb)
        for part in ("", "/status")
        for verb in ("get", "list", "watch")
    }
    write = {
        (names.GROUP, names.PLURAL, verb)
        for verb in ("create", "update", "patch", "delete", "deletecollection")
    }

    def ours(role: str) -> set[Right]:
        return {right for right in rights(cluster, TEAM, accounts[role]) if right[0] == names.GROUP}

    # A controller puts the roles together.
    wait_until(lambda: ours("edit") == read | write, what="rights to edit", seconds=SECONDS)
    assert ours("view") == read
    cluster.kubectl("delete", f"-n={TEAM}", "serviceaccount,rolebinding", "view", "edit")


# The trainer's pods


def a_run(name: str) -> Object:
    """Return a manifest for a cluster, as it is sent."""
    edits = {
        "metadata.name": name,
        "metadata.namespace": None,
        "metadata.uid": None,
        "spec.model.secretName": "hub-token",
        "spec.dataset.source": "pvc://datasets/rows.jsonl",
        "spec.storage": {"size": "1Gi", "modelsClaimName": "models"},
    }
    return edited(edits)


def trainer_job() -> Object:
    """Return the Job that prepares a run, the one whose pod has every kind of volume."""
    manifest = parse_manifest(a_run("finance"))
    assert isinstance(manifest, StagedFineTune), manifest
    owner = Owner(name="finance", namespace=TEAM, uid="0c4a3e62-5d8f-4c9a-9a52-0d8f7c1d9a11")
    config = build_stage_file(owner, manifest.spec, PREPARE)
    order = JobOrder(config=config, task=PREPARE.key, attempt=1, claim="run")
    settings = Settings(trainer_image="stagetune/trainer:0.1.0", progress_url="http://progress:80")
    return build_job(owner, manifest.spec, settings, order)


def try_pod(cluster: Cluster, change: Callable[[Object], object] = lambda pod: None) -> Answer:
    """Ask the server what it says to the trainer's pod after `change`, without making it."""
    template = trainer_job()["spec"]["template"]
    change(template["spec"])
    template["metadata"]["generateName"] = "finance-prepare-"
    path = f"/api/v1/namespaces/{TEAM}/pods?dryRun=All&fieldValidation=Strict"
    cluster.kubectl("wait", "--for=create", "--timeout=60s", "serviceaccount/default", f"-n={TEAM}")
    return cluster.request("POST", path, template)


def test_the_trainers_pod_is_restricted(cluster: Cluster) -> None:
    answer = try_pod(cluster)
    assert answer.status == HTTPStatus.CREATED, answer.message
    projected = [volume for volume in answer.body["spec"]["volumes"] if "projected" in volume]
    # No token but the one for progress: the server has added none.
    assert [volume["name"] for volume in projected] == ["progress-token"]


@pytest.mark.parametrize(
    ("place", "value", "complaint"),
    [
        (["hostNetwork"], True, "host namespaces"),
        (["hostPID"], True, "host namespaces"),
        (["securityContext", "runAsNonRoot"], False, "runAsNonRoot != true"),
        (["securityContext", "runAsUser"], 0, "runAsUser=0"),
        (["securityContext", "seccompProfile"], None, "seccompProfile"),
        (["containers", 0, "securityContext", "privileged"], True, "allowPrivilegeEscalation"),
        (
            ["containers", 0, "securityContext", "allowPrivilegeEscalation"],
            True,
            "allowPrivilegeEscalation != false",
        ),
        (["containers", 0, "securityContext", "capabilities"], None, "unrestricted capabilities"),
        (["volumes", 1], {"name": "tmp", "hostPath": {"path": "/"}}, "hostPath"),
    ],
)
def test_a_namespace_that_enforces_it_refuses_anything_less(
    place: list[Any], value: Any, complaint: str, cluster: Cluster
) -> None:
    def change(pod: Object) -> None:
        *parents, last = place
        part: Any = pod
        for parent in parents:
            part = part[parent]
        part[last] = value

    answer = try_pod(cluster, change)
    refusals = (HTTPStatus.FORBIDDEN, HTTPStatus.UNPROCESSABLE_ENTITY)
    assert answer.status in refusals, answer
    assert complaint in answer.message


# The operator itself, with the rights and the environment of the chart


class Training:
    """How the stand-in node's pods end: those of runs at once and well, all others never.

    The first stage goes on until it is asked to stop, as long as it is `held`.
    """

    def __init__(self) -> None:
        self.held = True

    def __call__(self, pod: Object) -> Program | NeverStarts:
        text = pod["metadata"].get("annotations", {}).get(names.ANNOTATION_STAGE_CONFIG)
        if text is None:
            return Runs(seconds=3600)
        config = StageConfig.model_validate_json(text)
        done = Ended(message=report_for(config).termination_message())
        if self.held and config.stage is not None and config.stage.index == 0:
            interrupted = Ended(exit_code=int(names.TrainerExitCode.INTERRUPTED))
            return Runs(seconds=3600, on_stop=interrupted)
        return Runs(seconds=0.1, then=done)


@pytest.fixture(scope="module")
def storage(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Volumes for the claims of runs."""
    make_storage(cluster, tmp_path_factory.mktemp("volumes"))


class DeployedOperator(OperatorProcess):
    """A process with the environment, the account and the probes of the chart's Deployment."""

    def __init__(self, cluster: Cluster, directory: Path) -> None:
        (deployment,) = listed(cluster, "deployments", f"-n={SYSTEM}")
        pod = deployment["spec"]["template"]["spec"]
        (self._container,) = pod["containers"]
        token = cluster.kubectl("create", "token", pod["serviceAccountName"], f"-n={SYSTEM}")
        config = json.loads(cluster.kubeconfig.read_text())
        config["users"][0]["user"] = {"token": token.strip()}
        kubeconfig = directory / "operator.json"
        kubeconfig.write_text(json.dumps(config))
        settings = {
            entry["name"].removeprefix("STAGETUNE_"): entry["value"]
            for entry in self._container["env"]
        }
        super().__init__(kubeconfig, directory / "operator.log", settings)
        self._ports = {
            "progress": self.progress_port,
            "metrics": self.metrics_port,
            "health": self.health_port,
        }

    def probe(self, name: str) -> int:
        """Return the status that a probe gets."""
        get = self._container[name]["httpGet"]
        return self.send(get["port"], get["path"])

    def send(self, port: str, path: str, body: Object | None = None, token: str = "") -> int:
        """Return the status of the answer that a request to one of the pod's ports gets."""
        connection = http.client.HTTPConnection("127.0.0.1", self._ports[port], timeout=20)
        headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
        try:
            method = "GET" if body is None else "POST"
            connection.request(method, path, None if body is None else json.dumps(body), headers)
            return connection.getresponse().status
        finally:
            connection.close()


@pytest.mark.parametrize("mode", [NAMESPACED, {}], ids=["one namespace", "cluster-wide"])
@pytest.mark.usefixtures("storage")
def test_the_operator_brings_a_run_to_its_end_with_the_rights_of_the_chart(
    mode: Object, install: Install, cluster: Cluster, tmp_path: Path
) -> None:
    install(mode)
    training = Training()
    operator = DeployedOperator(cluster, tmp_path)
    where = f"-n={TEAM}"
    example = QUICK_START / "finance-qa-cluster.yaml"
    name = YAML_1_2.load(example)["metadata"]["name"]
    run, first = f"{names.PLURAL}/{name}", "01-layers-0-1"
    path = f"/apis/{names.API_VERSION}/namespaces/{TEAM}"
    pods = [where, f"-l={names.LABEL_RUN}={name},{names.LABEL_TASK}={first}"]

    def until(holds: Callable[[], bool], what: str) -> None:
        wait_until(holds, what=what, seconds=SECONDS)

    def suspend(value: bool) -> None:
        change = json.dumps({"spec": {"suspend": value}})
        cluster.kubectl("patch", run, where, "--type=merge", "-p", change)

    def has_succeeded() -> bool:
        return cluster.kubectl("get", run, where, "-o=jsonpath={.status.state}") == "Succeeded"

    try:
        with StandInKubelet(cluster.kubeconfig, training), operator:
            until(lambda: operator.probe("readinessProbe") == HTTPStatus.OK, "readiness")
            cluster.kubectl("create", f"-n={OTHER}", "-f-", stdin=json.dumps(a_run("elsewhere")))
            cluster.kubectl("apply", where, "-f", str(QUICK_START / "inputs-claim.yaml"))
            cluster.kubectl("apply", where, "-f", str(example))

            until(lambda: bool(listed(cluster, "pods", *pods)), "pod of the first stage")
            (pod,) = listed(cluster, "pods", *pods)
            bound = [f"--bound-object-name={pod['metadata']['name']}", "--bound-object-kind=Pod"]
            audience = f"--audience={names.PROGRESS_AUDIENCE}"
            token = cluster.kubectl("create", "token", "default", where, audience, *bound).strip()
            body = {"trainerStatus": {"progressPercentage": 50}}
            post = ["progress", f"{path}/runs/{name}/tasks/{first}/progress", body]
            assert operator.send(*post, token) == HTTPStatus.OK
            assert operator.send(*post, "made.up.token") == HTTPStatus.UNAUTHORIZED

            suspend(True)
            cluster.kubectl("wait", "--for=condition=Suspended", run, where, "--timeout=60s")
            training.held = False
            suspend(False)
            until(has_succeeded, "successful run")

            events = listed(cluster, "events", where)
            assert {"Prepared", "Planned", "Suspended", "Completed"} <= {
                event["reason"] for event in events if event["involvedObject"]["kind"] == names.KIND
            }
            elsewhere = cluster.request(
                "GET", f"{path.replace(TEAM, OTHER)}/{names.PLURAL}/elsewhere"
            )
            assert ("status" in elsewhere.body) is (not mode)
            assert operator.probe("livenessProbe") == HTTPStatus.OK
            assert operator.send("metrics", "/metrics") == HTTPStatus.OK
        log = operator.log.read_text()
        assert not re.search("forbidden|ERROR|Traceback", log, re.IGNORECASE), log
    finally:
        kinds = f"{names.PLURAL},jobs,pods,configmaps,persistentvolumeclaims,events"
        options = ["--all", "--grace-period=0", "--force", "--timeout=60s"]
        for namespace in (TEAM, OTHER):
            cluster.try_kubectl("delete", kinds, *options, f"-n={namespace}")
