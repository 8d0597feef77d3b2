"""The CustomResourceDefinition on a real API server: established, and its rules do what they say.

The unit tests hold the same table against a reading of the CRD in Python; here is what that reading
was written after. All tests that need a cluster stay in one file, so that one worker of
pytest-xdist has it.
"""

import hashlib
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
    EXAMPLES,
    FREE_CHANGES,
    FROZEN_CHANGES,
    LOWER,
    MANIFEST,
    PLANNED,
    QUANTITIES,
    SECTIONS_WITH_DEFAULTS,
    THREE_STAGES,
    UPPER,
    Case,
    Edits,
    edited,
    in_stages,
    stage_edits,
    stages_in,
)
from stagetune_api import names
from stagetune_api.rules import STAGES_RULE
from stagetune_api.schema import build_crd
from stagetune_api.spec import StagedFineTune, StagedFineTuneSpec
from stagetune_api.status import StagedFineTuneStatus
from stagetune_api.structural import Node
from stagetune_api.validation import parse_manifest

pytestmark = pytest.mark.control_plane

ROOT = Path(__file__).resolve().parents[2]
GOLDEN_STATUS = ROOT / "tests" / "data" / "golden" / "status.yaml"
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

    def started(self, name: str, edits: Edits | None = None, status: Node | None = None) -> Node:
        """Create a run, say that it is prepared, and return it as it is stored."""
        created = self.create(sent(edits, name), **STRICT)
        assert created.status == HTTPStatus.CREATED, created.message
        document = {**created.body, "status": status or {"conditions": [PLANNED]}}
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


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_example_is_accepted(path: Path, cluster: Cluster, crd: str, namespace: str) -> None:
    said = cluster.kubectl("apply", "--dry-run=server", "-n", namespace, "-f", str(path))
    name = YAML(typ="safe").load(path)["metadata"]["name"]
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
    document = sent(SECTIONS_WITH_DEFAULTS)
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


@pytest.mark.parametrize("field", FROZEN_CHANGES)
def test_started_run_refuses_a_change(field: str, runs: Runs) -> None:
    started = runs.started(f"change-{field.lower()}")
    changed = {**started, "spec": {**started["spec"], field: FROZEN_CHANGES[field]}}
    refused = causes(runs.replace(changed, **DRY_RUN))
    message = f"spec.{field} cannot change once the run has started"
    assert [at for at, text in refused if message in text] == [f"spec.{field}"]


@pytest.mark.parametrize("field", ["protection", "storage", "evaluation", "serve"])
def test_started_run_refuses_that_a_section_is_removed(field: str, runs: Runs) -> None:
    started = runs.started(f"remove-{field}", {f"spec.{field}": FROZEN_CHANGES[field]})
    spec = {name: value for name, value in started["spec"].items() if name != field}
    ((at, text),) = causes(runs.replace({**started, "spec": spec}, **DRY_RUN))
    assert at == f"spec.{field}"
    assert f"spec.{field} cannot change" in text


@pytest.mark.parametrize("field", FREE_CHANGES)
def test_started_run_lets_a_free_field_come_and_go(field: str, runs: Runs) -> None:
    document = runs.started(f"free-{field}")
    without = {name: value for name, value in document["spec"].items() if name != field}
    for spec in ({**without, field: FREE_CHANGES[field]}, without):
        answer = runs.replace({**document, "spec": spec}, **STRICT)
        assert answer.status == HTTPStatus.OK, answer.message
        document = answer.body
        stored = StagedFineTuneSpec.model_validate(document["spec"])
        assert stored == StagedFineTuneSpec.model_validate(spec)


@pytest.mark.parametrize(
    ("stages", "states"), stage_edits("refused").values(), ids=stage_edits("refused").keys()
)
def test_stage_that_has_started_keeps_its_fields_and_its_place(
    stages: tuple[Node, ...], states: str, runs: Runs, request: pytest.FixtureRequest
) -> None:
    edits = in_stages(*THREE_STAGES)
    started = runs.started(name_for(request), edits, stages_in(states))
    changed = {**started, "spec": {**started["spec"], "stages": list(stages)}}
    ((at, text),) = causes(runs.replace(changed, **DRY_RUN))
    assert at == "spec.stages"
    assert STAGES_RULE.message in text


@pytest.mark.parametrize(
    ("stages", "states"), stage_edits("accepted").values(), ids=stage_edits("accepted").keys()
)
def test_stage_that_is_pending_may_change(
    stages: tuple[Node, ...], states: str, runs: Runs, request: pytest.FixtureRequest
) -> None:
    edits = in_stages(*THREE_STAGES)
    started = runs.started(name_for(request), edits, stages_in(states))
    changed = {**started, "spec": {**started["spec"], "stages": list(stages)}}
    answer = runs.replace(changed, **STRICT)
    assert answer.status == HTTPStatus.OK, answer.message
    assert [stage["name"] for stage in answer.body["spec"]["stages"]] == [
        stage["name"] for stage in stages
    ]


def name_for(request: pytest.FixtureRequest) -> str:
    """Return a name of a run that no other test has."""
    return f"run-{hashlib.sha256(request.node.nodeid.encode()).hexdigest()[:16]}"


def test_longest_run_is_within_what_the_server_computes(runs: Runs) -> None:
    # Costs are estimated when the CRD is applied, and counted when its rules are computed.
    stages = [
        {"name": f"stage-{number:03}-{'n' * 6}", "layers": {"first": number, "last": number}}
        for number in range(128)
    ]
    reported = [{**stage, "state": "Succeeded"} for stage in stages[:-1]]
    reported.append({**stages[-1], "state": "Pending"})
    status = {"conditions": [PLANNED], "stages": reported}
    started = runs.started("longest", in_stages(*stages), status)

    last = {**stages[-1], "epochs": 2}
    answer = runs.replace({**started, "spec": {**started["spec"], "stages": [*stages[:-1], last]}})
    assert answer.status == HTTPStatus.OK, answer.message
    first = {**stages[0], "epochs": 2}
    spec = {**started["spec"], "stages": [first, *stages[1:-1], last]}
    ((at, text),) = causes(runs.replace({**answer.body, "spec": spec}, **DRY_RUN))
    assert at == "spec.stages"
    assert STAGES_RULE.message in text


@pytest.mark.parametrize("field", ["limits", "requests"])
@pytest.mark.parametrize("amount", QUANTITIES["accepted"])
def test_quantity_is_a_number_or_a_text(field: str, amount: Any, runs: Runs) -> None:
    document = sent({f"spec.runtime.resources.{field}": {"memory": amount}})
    answer = runs.create(document, **DRY_RUN)
    assert answer.status == HTTPStatus.CREATED, answer.message
    stored = answer.body["spec"]["runtime"]["resources"][field]["memory"]
    assert (type(stored), stored) == (type(amount), amount)


@pytest.mark.parametrize("field", ["limits", "requests"])
@pytest.mark.parametrize("amount", QUANTITIES["refused"], ids=repr)
def test_anything_else_is_no_quantity(field: str, amount: Any, runs: Runs) -> None:
    document = sent({f"spec.runtime.resources.{field}": {"memory": amount}})
    refused = causes(runs.create(document, **DRY_RUN))
    assert f"spec.runtime.resources.{field}.memory" in [at for at, _ in refused]


def test_amount_that_is_null_is_taken_away(runs: Runs) -> None:
    amounts = {"nvidia.com/gpu": None, "memory": "48Gi"}
    answer = runs.create(sent({"spec.runtime.resources.limits": amounts}), **DRY_RUN)
    assert answer.status == HTTPStatus.CREATED, answer.message
    assert answer.body["spec"]["runtime"]["resources"]["limits"] == {"memory": "48Gi"}


@pytest.mark.parametrize(
    "conditions",
    [[], [{**PLANNED, "status": "False"}], [{**PLANNED, "type": "Validated"}]],
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


def test_started_run_takes_the_same_manifest_again(
    cluster: Cluster, runs: Runs, namespace: str
) -> None:
    text = json.dumps(sent({"metadata.namespace": namespace}, "again"))
    cluster.kubectl("apply", "-f", "-", stdin=text)
    document = {**runs.get("again"), "status": {"conditions": [PLANNED]}}
    assert runs.replace(document, "/status").status == HTTPStatus.OK
    said = cluster.kubectl("apply", "-f", "-", stdin=text)
    assert said == f"{names.SINGULAR}.{names.GROUP}/again unchanged\n"
