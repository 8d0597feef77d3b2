"""The CustomResourceDefinition on a real API server: established, and its rules do what they say.

The unit tests hold the same table against a reading of the CRD in Python; here is what that reading
was written after. All tests that need a cluster stay in one file, so that one worker of
pytest-xdist has it.
"""

import json
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest
from ruamel.yaml import YAML

from local_cluster.api import Answer, Cluster
from manifest_cases import (
    CASES,
    CHANGES,
    LOWER,
    MANIFEST,
    PREPARED,
    UPPER,
    Case,
    Edits,
    edited,
    in_stages,
)
from stagetune_api import names
from stagetune_api.schema import build_crd
from stagetune_api.spec import StagedFineTune
from stagetune_api.status import StagedFineTuneStatus
from stagetune_api.structural import Node
from stagetune_api.validation import parse_manifest

pytestmark = pytest.mark.control_plane

ROOT = Path(__file__).resolve().parents[2]
GOLDEN_STATUS = ROOT / "tests" / "data" / "golden" / "status.yaml"
EXAMPLES = ("examples/quickstart/finance-qa.yaml", "examples/qwen2.5-7b-finance.yaml")
STRICT = {"fieldValidation": "Strict"}
DRY_RUN = {**STRICT, "dryRun": "All"}


class Runs:
    """The StagedFineTunes of one namespace, over the API."""

    def __init__(self, cluster: Cluster, namespace: str) -> None:
        self._cluster = cluster
        self._path = f"/apis/{names.API_VERSION}/namespaces/{namespace}/{names.PLURAL}"

    def create(self, document: Node, **options: str) -> Answer:
        return self._cluster.request("POST", self._at("", options), document)

    def replace(self, document: Node, part: str = "", **options: str) -> Answer:
        path = self._at(f"/{document['metadata']['name']}{part}", options)
        return self._cluster.request("PUT", path, document)

    def get(self, name: str) -> Node:
        answer = self._cluster.request("GET", self._at(f"/{name}", {}))
        assert answer.status == HTTPStatus.OK, answer.message
        body: Node = answer.body
        return body

    def started(self, name: str, edits: Edits | None = None) -> Node:
        """Create a run, say that it is prepared, and return it as it is stored."""
        created = self.create(sent(edits, name), **STRICT)
        assert created.status == HTTPStatus.CREATED, created.message
        document = {**created.body, "status": {"conditions": [PREPARED]}}
        assert self.replace(document, "/status", **STRICT).status == HTTPStatus.OK
        return self.get(name)

    def _at(self, rest: str, options: dict[str, str]) -> str:
        return f"{self._path}{rest}?{urlencode(options)}"


@pytest.fixture(scope="session")
def runs(cluster: Cluster, crd: str, namespace: str) -> Runs:
    """StagedFineTunes of the test's namespace."""
    return Runs(cluster, namespace)


def sent(edits: Edits | None = None, name: str | None = None) -> Node:
    """Return a manifest as it is sent: the server gives the uid, the path the namespace."""
    own = {"metadata.uid": None, "metadata.namespace": None}
    return edited({**own, **({"metadata.name": name} if name else {}), **(edits or {})})


def causes(answer: Answer) -> list[tuple[str, str]]:
    """Return the field and the message of everything that the server refuses."""
    assert answer.status == HTTPStatus.UNPROCESSABLE_ENTITY, answer
    return [(cause["field"], cause["message"]) for cause in answer.body["details"]["causes"]]


def all_cases() -> list[Any]:
    return [
        pytest.param(message, case, id=f"{message}-{number}")
        for message, cases in CASES.items()
        for number, case in enumerate(cases)
    ]


def test_crd_is_established_without_a_complaint(cluster: Cluster, crd: str) -> None:
    found = json.loads(cluster.kubectl("get", crd, "-o", "json"))
    conditions = {item["type"]: item["status"] for item in found["status"]["conditions"]}
    assert conditions == {"NamesAccepted": "True", "Established": "True"}


@pytest.mark.parametrize("path", EXAMPLES)
def test_example_is_accepted(path: str, cluster: Cluster, crd: str, namespace: str) -> None:
    said = cluster.kubectl("apply", "--dry-run=server", "-n", namespace, "-f", str(ROOT / path))
    name = YAML(typ="safe").load(ROOT / path)["metadata"]["name"]
    assert said == f"{names.SINGULAR}.{names.GROUP}/{name} created (server dry run)\n"


def test_learning_rate_without_a_point_is_a_number(
    cluster: Cluster, crd: str, namespace: str
) -> None:
    assert "learningRate: 1e-4" in MANIFEST
    text = MANIFEST.replace("namespace: team-a", f"namespace: {namespace}")
    text = "".join(line for line in text.splitlines(keepends=True) if " uid: " not in line)
    said = cluster.kubectl("apply", "--dry-run=server", "-o", "json", "-f", "-", stdin=text)
    assert json.loads(said)["spec"]["training"]["learningRate"] == 1e-4


@pytest.mark.parametrize(("message", "case"), all_cases())
def test_rule_refuses_with_its_message_at_its_field(message: str, case: Case, runs: Runs) -> None:
    refused = causes(runs.create(sent(case.refused), **DRY_RUN))
    (field,) = [field for field, text in refused if message in text]
    # The server points at the field of the rule, the validator at the item in a list below it. A
    # rule on the whole object has no field that it could point at.
    assert field == "<nil>" or case.path.startswith(field) or field.startswith(case.path)


@pytest.mark.parametrize(("message", "case"), all_cases())
def test_rule_accepts_the_other_side(message: str, case: Case, runs: Runs) -> None:
    answer = runs.create(sent(case.accepted), **DRY_RUN)
    assert answer.status == HTTPStatus.CREATED, answer.message


def test_stage_names_must_differ(runs: Runs) -> None:
    document = sent(in_stages(LOWER, {**UPPER, "name": "lower"}))
    ((field, text),) = causes(runs.create(document, **DRY_RUN))
    assert field == "spec.stages[1]"
    assert "Duplicate value" in text


@pytest.mark.parametrize(
    ("edits", "message"),
    [
        ({"spec.colour": "red"}, 'unknown field "spec.colour"'),
        ({"spec.training.learningRte": 1e-4}, 'unknown field "spec.training.learningRte"'),
        ({"spec.training.learningRate": "1e-4"}, "must be of type number"),
        ({"spec.training.learningRate": 0}, "should be greater than 0"),
        ({"spec.schedule.layersPerStage": 1.5}, "must be of type integer"),
        ({"spec.schedule.order": "bottomUp"}, 'supported values: "BottomUp"'),
        ({"spec.model.source": "https://example.com/model"}, "should match"),
        ({"spec.dataset": None}, "spec.dataset: Required value"),
    ],
)
def test_kubectl_shows_what_the_schema_refuses(
    edits: Edits, message: str, cluster: Cluster, crd: str, namespace: str
) -> None:
    text = json.dumps(sent({"metadata.namespace": namespace, **edits}))
    done = cluster.try_kubectl("apply", "--dry-run=server", "-f", "-", stdin=text)
    assert done.returncode == 1
    assert message in done.stderr


def test_server_fills_in_the_defaults_of_the_models(runs: Runs) -> None:
    document = sent({"spec.training.earlyStopping": {}, "spec.evaluation": {"exactMatch": {}}})
    parsed = parse_manifest(document)
    assert isinstance(parsed, StagedFineTune)
    stored = runs.create(document, **DRY_RUN).body["spec"]
    assert stored == parsed.spec.model_dump(mode="json", exclude_none=True)


def test_explain_prints_the_description(cluster: Cluster, crd: str) -> None:
    spec = build_crd()["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]
    field = spec["properties"]["schedule"]["properties"]["layersPerStage"]
    said = cluster.kubectl("explain", f"{names.SHORT_NAME}.spec.schedule.layersPerStage")
    assert " ".join(field["description"].split()) in " ".join(said.split())
    assert "FIELD: layersPerStage <integer>" in said


def test_columns_show_the_run(cluster: Cluster, runs: Runs, namespace: str) -> None:
    document = sent({"spec.runtime": {"queueName": "team-a"}}, "columns")
    created = runs.create(document).body
    status = YAML(typ="safe").load(GOLDEN_STATUS)
    assert runs.replace({**created, "status": status}, "/status").status == HTTPStatus.OK

    head, row = cluster.kubectl("get", "sft", "columns", "-n", namespace).splitlines()
    assert head.split() == ["NAME", "STATE", "STAGE", "PROGRESS", "LOSS", "ETA", "AGE"]
    assert row.startswith("columns")
    for column in ("State", "Stage", "Progress", "Loss", "ETA"):
        start = head.index(column.upper())
        assert row[start:].startswith(status[column.lower()])

    head, row = cluster.kubectl("get", "sft", "columns", "-n", namespace, "-o", "wide").splitlines()
    assert row[head.index("QUEUE") :].startswith("team-a")
    assert cluster.kubectl("get", names.CATEGORY, "-n", namespace, "-o", "name").splitlines()


def test_status_goes_through_the_server_and_back_unchanged(runs: Runs) -> None:
    created = runs.create(sent(name="status")).body
    golden = YAML(typ="safe").load(GOLDEN_STATUS)
    written = StagedFineTuneStatus.model_validate(golden).model_dump(mode="json")

    answer = runs.replace({**created, "status": written}, "/status", **STRICT)
    assert answer.status == HTTPStatus.OK, answer.message
    stored = runs.get("status")
    assert stored["status"] == golden
    assert stored["spec"] == created["spec"]
    assert stored["metadata"]["generation"] == created["metadata"]["generation"]


def test_status_is_written_apart_from_the_manifest(runs: Runs) -> None:
    started = runs.started("apart")
    assert runs.replace({**started, "status": {"state": "Failed"}}).status == HTTPStatus.OK
    assert runs.get("apart")["status"] == started["status"]


@pytest.mark.parametrize("field", CHANGES)
def test_started_run_refuses_a_change(field: str, runs: Runs) -> None:
    started = runs.started(f"change-{field.lower()}")
    changed = {**started, "spec": {**started["spec"], field: CHANGES[field]}}
    refused = causes(runs.replace(changed, **DRY_RUN))
    message = f"spec.{field} cannot change once the run has started"
    assert [at for at, text in refused if message in text] == [f"spec.{field}"]


@pytest.mark.parametrize("field", ["protection", "runtime", "storage", "evaluation", "serve"])
def test_started_run_refuses_that_a_section_is_removed(field: str, runs: Runs) -> None:
    started = runs.started(f"remove-{field}", {f"spec.{field}": CHANGES[field]})
    spec = {name: value for name, value in started["spec"].items() if name != field}
    ((at, text),) = causes(runs.replace({**started, "spec": spec}, **DRY_RUN))
    assert at == f"spec.{field}"
    assert f"spec.{field} cannot change" in text


@pytest.mark.parametrize(
    "conditions",
    [[], [{**PREPARED, "status": "False"}], [{**PREPARED, "type": "Validated"}]],
    ids=["none", "preparing", "validated"],
)
def test_run_that_has_not_started_may_change(
    conditions: list[Node], request: pytest.FixtureRequest, runs: Runs
) -> None:
    name = f"waiting-{request.node.callspec.id}"
    created = runs.create(sent(name=name)).body
    runs.replace({**created, "status": {"conditions": conditions}}, "/status")
    stored = runs.get(name)
    changed = {**stored, "spec": {**stored["spec"], "storage": {"size": "1Gi"}}}
    answer = runs.replace(changed, **DRY_RUN)
    assert answer.status == HTTPStatus.OK, answer.message


def test_started_run_may_be_suspended_and_let_go_on(runs: Runs) -> None:
    document = runs.started("suspend")
    for suspend in (True, False):
        answer = runs.replace({**document, "spec": {**document["spec"], "suspend": suspend}})
        assert answer.status == HTTPStatus.OK, answer.message
        document = answer.body
        assert document["spec"]["suspend"] is suspend


def test_started_run_takes_the_same_manifest_again(
    cluster: Cluster, runs: Runs, namespace: str
) -> None:
    text = json.dumps(sent({"metadata.namespace": namespace}, "again"))
    cluster.kubectl("apply", "-f", "-", stdin=text)
    document = {**runs.get("again"), "status": {"conditions": [PREPARED]}}
    assert runs.replace(document, "/status").status == HTTPStatus.OK
    said = cluster.kubectl("apply", "-f", "-", stdin=text)
    assert said == f"{names.SINGULAR}.{names.GROUP}/again unchanged\n"
