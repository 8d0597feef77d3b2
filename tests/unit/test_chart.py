"""The chart, as far as it can be held to its sources without Helm.

Helm and an API server see it in tests/control_plane/test_chart.py.
"""

import asyncio
import importlib.metadata
import inspect
import json
import re
import runpy
from pathlib import Path
from typing import Any

import celpy
import celpy.adapter
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from jsonschema import Draft202012Validator
from kubernetes.aio.client import ApiClient, Configuration
from ruamel.yaml import YAML

from stagetune_api import names
from stagetune_api.spec import StagedFineTune
from stagetune_api.status import ConditionReason, RunState, StagedFineTuneStatus
from stagetune_api.validation import parse_manifest
from stagetune_operator.cluster import Cluster
from stagetune_operator.conditions import Standing, with_standing
from stagetune_operator.keys import RunKey
from stagetune_operator.resources import Collection
from stagetune_operator.settings import Settings

Object = dict[str, Any]
Right = tuple[str, str, str]
"""A group, a resource with its subresource, and a verb."""

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "charts" / "stagetune"
RENDER = runpy.run_path(str(ROOT / "deploy" / "render.py"))
YAML_1_2 = YAML(typ="safe", pure=True)
VALUES: Object = YAML_1_2.load(CHART / "values.yaml")
SCHEMA: Object = json.loads((CHART / "values.schema.json").read_text())
WATCHED = (Collection.RUNS, Collection.JOBS, Collection.PODS)
BY_WATCHES = {
    (where.root.removeprefix("/apis/").partition("/")[0] * ("apis" in where.root), where.plural, do)
    for where in WATCHED
    for do in ("list", "watch")
}


@pytest.mark.parametrize("path", RENDER["generated_files"](), ids=lambda path: path.name)
def test_what_is_made_of_something_else_is_up_to_date(path: Path) -> None:
    assert path.read_text() == RENDER["generated_files"]()[path], "make manifests writes it anew"


def leaves(values: Object, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Return the paths of all values, each only down to where it is described as a whole."""
    described = {value.path for value in RENDER["documented_values"]()}
    found: list[tuple[str, ...]] = []
    for name, value in values.items():
        here = (*path, name)
        is_group = isinstance(value, dict) and here not in described
        found += leaves(value, here) if is_group else [here]
    return found


def test_every_value_is_described() -> None:
    assert leaves(VALUES) == [value.path for value in RENDER["documented_values"]()]


def test_the_values_schema_knows_every_value_and_no_other() -> None:
    def known(schema: Object, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
        if "properties" not in schema:
            return [path]
        assert schema["additionalProperties"] is False, path
        parts = schema["properties"].items()
        return [leaf for name, part in parts for leaf in known(part, (*path, name))]

    Draft202012Validator.check_schema(SCHEMA)
    assert known(SCHEMA) == [("global",), *leaves(VALUES)]
    assert list(Draft202012Validator(SCHEMA).iter_errors(VALUES)) == []


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("watchNamespace", ["team-a"]),
        ("replicas", 2),
        ("image.tga", "1.0"),
        ("image.digest", "sha256:short"),
        ("image.repository", "stagetune/operator:1.0"),
        ("watchNamespaces", ["Team_A"]),
        ("watchNamespaces", ["team-a", "team-a"]),
        ("trainer.userId", 0),
        ("trainer.imagePullSecrets", ["by-name"]),
        ("progress.url", "stagetune.example"),
        ("workers", 0),
        ("log.level", "info"),
        ("commonLabels", {"app.kubernetes.io/name": "other"}),
        ("podLabels", {"app.kubernetes.io/component": "trainer"}),
        ("networkPolicy.hubPorts", []),
        ("networkPolicy.metricsFrom", [{"namespace": "monitoring"}]),
    ],
)
def test_the_values_schema_refuses(path: str, value: Any) -> None:
    *parents, last = path.split(".")
    changed: Object = {last: value}
    for parent in reversed(parents):
        changed = {parent: changed}
    assert list(Draft202012Validator(SCHEMA).iter_errors(changed))


def test_the_chart_is_of_the_programs_version() -> None:
    chart = YAML_1_2.load(CHART / "Chart.yaml")
    assert chart["appVersion"] == chart["version"] == importlib.metadata.version("stagetune")


def test_the_charts_example_is_a_valid_manifest_for_a_cluster() -> None:
    annotations = YAML_1_2.load(CHART / "Chart.yaml")["annotations"]
    (example,) = YAML_1_2.load(annotations["artifacthub.io/crdsExamples"])
    manifest = parse_manifest(example)
    assert isinstance(manifest, StagedFineTune), manifest
    assert manifest.spec.storage is not None
    (crd,) = YAML_1_2.load(annotations["artifacthub.io/crds"])
    assert (crd["kind"], crd["version"]) == (names.KIND, names.VERSION)
    assert crd["name"] == f"{names.PLURAL}.{names.GROUP}"


@pytest.fixture(scope="module")
def manifests() -> list[Object]:
    """What deploy/stagetune.yaml holds: the chart with its defaults."""
    return list(YAML_1_2.load_all((ROOT / "deploy" / "stagetune.yaml").read_text()))


def of_kind(manifests: list[Object], kind: str) -> dict[str, Object]:
    return {item["metadata"]["name"]: item for item in manifests if item["kind"] == kind}


def test_the_environment_holds_every_setting_with_the_operators_own_default(
    manifests: list[Object],
) -> None:
    (container,) = of_kind(manifests, "Deployment")["stagetune"]["spec"]["template"]["spec"][
        "containers"
    ]
    environment = {entry["name"]: entry["value"] for entry in container["env"]}
    # What is empty is left out, and ports are a matter of the pod alone.
    empty = {"image_pull_secrets", "namespaces"}
    expected = {name for name in Settings.model_fields if not name.startswith("port_")} - empty
    assert {name.removeprefix("STAGETUNE_").lower() for name in environment} == expected

    version = importlib.metadata.version("stagetune")
    services = of_kind(manifests, "Service")
    (port,) = services["stagetune-progress"]["spec"]["ports"]
    assert Settings.from_environment(environment) == Settings(
        trainer_image=f"stagetune/trainer:{version}",
        progress_url=f"http://stagetune-progress.stagetune-system.svc:{port['port']}",
    )


def test_the_ports_are_those_that_the_operator_listens_on(manifests: list[Object]) -> None:
    pod = of_kind(manifests, "Deployment")["stagetune"]["spec"]["template"]
    (container,) = pod["spec"]["containers"]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports == {
        "progress": names.OPERATOR_PROGRESS_PORT,
        "health": names.OPERATOR_HEALTH_PORT,
        "metrics": names.OPERATOR_METRICS_PORT,
    }
    for service in of_kind(manifests, "Service").values():
        (port,) = service["spec"]["ports"]
        assert port["port"] == ports[port["targetPort"]]
        assert service["spec"]["selector"].items() <= pod["metadata"]["labels"].items()


def rights_of(rules: list[Object]) -> set[Right]:
    return {
        (group, resource, verb)
        for rule in rules
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }


def right_for(method: str, path: str) -> Right:
    """Return the right that a request takes, as the API server asks for it."""
    parts = path.strip("/").split("/")
    group, parts = ("", parts[2:]) if parts[0] == "api" else (parts[1], parts[3:])
    if parts[0] == "namespaces":
        parts = parts[2:]
    resource = "/".join([parts[0], *parts[2:]])
    verbs = {"POST": "create", "PUT": "update", "PATCH": "patch", "DELETE": "delete"}
    return group, resource, verbs.get(method, "list" if len(parts) == 1 else "get")


async def visit_everything(cluster: Cluster) -> set[str]:
    """Make every call that the operator can make; return the names of the methods."""
    key = RunKey("team-a", "finance")
    run: Object = {"metadata": {"name": "finance", "namespace": "team-a", "uid": "1"}, "spec": {}}
    run["metadata"]["resourceVersion"] = "1"
    calls = [
        cluster.read_run(key),
        cluster.list_jobs(key),
        cluster.list_pods(key),
        cluster.read_config_map("team-a", "plan"),
        cluster.read_claim("team-a", "run"),
        cluster.read_service("team-a", "finance-1"),
        *(
            cluster.create({"apiVersion": version, "kind": kind, "metadata": run["metadata"]})
            for version, kind in (
                ("batch/v1", "Job"),
                ("v1", "ConfigMap"),
                ("v1", "PersistentVolumeClaim"),
                ("v1", "Service"),
            )
        ),
        cluster.delete_job("team-a", "finance-prepare", "1"),
        cluster.write_status(run, {}),
        cluster.post_event(run, "Normal", "Planned", "planned"),
        cluster.review_token("token", names.PROGRESS_AUDIENCE),
        *(cluster.list_versions(where, None) for where in WATCHED),
        cluster.is_reachable(),
    ]
    for call in calls:
        await call
    return {call.__name__ for call in calls}


def test_the_operator_may_do_what_it_does_and_nothing_else(manifests: list[Object]) -> None:
    """Against a server that writes down what is asked of it."""
    used: set[Right] = set()

    async def answer(request: web.Request) -> web.Response:
        if request.path != "/version":
            used.add(right_for(request.method, request.path))
        return web.json_response({"items": [], "metadata": {}})

    async def main() -> set[str]:
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", answer)
        async with TestServer(app) as server:
            client = ApiClient(Configuration(host=str(server.make_url("/")).rstrip("/")))
            async with client:
                return await visit_everything(Cluster(client))

    methods = inspect.getmembers(Cluster, inspect.iscoroutinefunction)
    assert asyncio.run(main()) == {name for name, _ in methods if not name.startswith("_")}

    roles = of_kind(manifests, "ClusterRole")
    reviews = {("authentication.k8s.io", "tokenreviews", "create")}
    assert rights_of(roles["stagetune-token-reviews-stagetune-system"]["rules"]) == reviews
    # Nothing asks for it but the admission of blockOwnerDeletion.
    finalizers = {(names.GROUP, f"{names.PLURAL}/finalizers", "update")}
    granted = rights_of(roles["stagetune"]["rules"])
    assert granted == (used - reviews) | BY_WATCHES | finalizers


def test_the_documented_rights_are_those_of_the_chart(manifests: list[Object]) -> None:
    text = (ROOT / "docs" / "install.md").read_text()
    rows = re.findall(r"^\| (core|`[a-z.]+`) \| `([a-z/]+)` \| ([a-z, ]+) \| ", text, re.MULTILINE)
    documented = {
        (group.strip("`").replace("core", ""), resource, verb)
        for group, resource, verbs in rows
        for verb in verbs.split(", ")
    }
    assert documented == rights_of(of_kind(manifests, "ClusterRole")["stagetune"]["rules"])


@pytest.mark.parametrize(
    "document", ["docs/install.md", "docs/gitops.md", "charts/stagetune/README.md"]
)
def test_documents_name_values_and_files_that_there_are(document: str) -> None:
    text = (ROOT / document).read_text()
    known = {".".join(path) for path in leaves(VALUES)}
    groups = {name.rpartition(".")[0] for name in known} | {
        name.partition(".")[0] for name in known
    }
    named = set(re.findall(r"--set ([A-Za-z.]+)=", text))
    roots = "|".join(VALUES)
    named |= set(re.findall(rf"`((?:{roots})(?:\.[A-Za-z.]+)?)`", text))
    assert named
    assert named <= known | groups
    for path in re.findall(r"(?:-f|kubectl cp) ([a-z]\S*)", text):
        # What the quick start makes is not in the repository.
        assert (ROOT / path).exists() or path == "examples/quickstart/inputs"


def flux_expressions() -> dict[str, str]:
    """Return the expressions in docs/gitops.md by their names."""
    text = (ROOT / "docs" / "gitops.md").read_text()
    (block,) = [part for part in text.split("```yaml\n")[1:] if "healthCheckExprs" in part]
    (check,) = YAML_1_2.load(block.partition("```")[0])["spec"]["healthCheckExprs"]
    assert (check.pop("apiVersion"), check.pop("kind")) == (names.API_VERSION, names.KIND)
    return dict(check)


STANDINGS = {
    "training": (Standing(state=RunState.TRAINING, reason=ConditionReason.TRAINING), "inProgress"),
    "suspended": (
        Standing(state=RunState.SUSPENDED, reason=ConditionReason.SUSPENDED, is_suspended=True),
        "inProgress",
    ),
    "succeeded": (Standing(state=RunState.SUCCEEDED, reason=ConditionReason.COMPLETED), "current"),
    "failed": (
        Standing(state=RunState.FAILED, reason=ConditionReason.STAGE_FAILED, is_stalled=True),
        "failed",
    ),
}


def holding(run: Object) -> list[str]:
    """Return which of Flux' expressions hold for `run`."""
    scope = {name: celpy.adapter.json_to_cel(part) for name, part in run.items()}
    environment = celpy.Environment()
    return [
        name
        for name, text in flux_expressions().items()
        if environment.program(environment.compile(text)).evaluate(scope)
    ]


@pytest.mark.parametrize("name", STANDINGS)
def test_flux_reads_the_status(name: str) -> None:
    standing, expected = STANDINGS[name]
    now = "2026-01-01T00:00:00Z"
    status = with_standing(StagedFineTuneStatus(), standing, generation=2, now=now)
    run: Object = {"metadata": {"generation": 2}, "status": status.model_dump(mode="json")}
    assert holding(run) == [expected]
    # The manifest was changed and the operator has not seen it yet.
    assert holding({**run, "metadata": {"generation": 3}}) == ["inProgress"]


def test_flux_waits_for_a_run_that_nobody_has_looked_at() -> None:
    assert holding({"metadata": {"generation": 1}, "status": {}}) == ["inProgress"]
