"""What is created for a run: one Job whole, and what holds for the Jobs of every task."""

from collections.abc import Mapping
from typing import Any

import kubernetes_validate
import pytest
from ruamel.yaml import YAML

from fake_cluster import FACTS
from manifest_cases import ROOT, edited
from stagetune_api import names
from stagetune_api.spec import StagedFineTune, StagedFineTuneSpec
from stagetune_api.stage import StageConfig
from stagetune_api.validation import parse_manifest
from stagetune_operator.manifests import (
    build_claim,
    build_job,
    build_service,
    claim_name,
    config_digest,
    job_name,
)
from stagetune_operator.ownership import Owner
from stagetune_operator.plan import make_plan
from stagetune_operator.plan_record import digest_of_planned
from stagetune_operator.pod_template import JobOrder
from stagetune_operator.settings import Settings
from stagetune_operator.stage_files import PREPARE, Step, build_stage_file, steps_after_prepare
from stagetune_operator.views import Object

GOLDEN = ROOT / "tests" / "data" / "golden" / "prepare-job.yaml"
OWNER = Owner(name="finance-qa", namespace="team-a", uid="0c4a3e62-5d8f-4c9a-9a52-0d8f7c1d9a11")
SETTINGS = Settings(
    trainer_image="registry.example/stagetune-trainer@sha256:" + "a" * 64,
    image_pull_secrets=("pull",),
    progress_url="http://stagetune.stagetune-system:8080/",
)
RICH = {
    "spec.model": {"source": "hf://org/name", "secretName": "model-hub"},
    "spec.dataset": {
        "source": "hf://org/rows",
        "secretName": "data-hub",
        "validation": {"source": "pvc://rows/validation.jsonl"},
    },
    "spec.evaluation": {"generalText": {"source": "pvc://texts/general.txt"}},
    "spec.schedule": {"layersPerStage": 2},
    "spec.runtime": {
        "resources": {"limits": {"nvidia.com/gpu": 1, "memory": "48Gi"}, "requests": {"cpu": "2"}},
        "queueName": "team-a",
        "priorityClassName": "low",
        "nodeSelector": {"zone": "a"},
        "tolerations": [{"key": "gpu", "operator": "Exists"}],
        "gracePeriodSeconds": 300,
    },
    "spec.storage": {"size": "100Gi", "modelsClaimName": "models"},
}
TASKS = ("prepare", "01-layers-0-1", "02-layers-2-3", "evaluate", "export")


def spec_of(edits: Mapping[str, Any] | None = None) -> StagedFineTuneSpec:
    manifest = parse_manifest(edited({**RICH, **(edits or {})}))
    assert isinstance(manifest, StagedFineTune)
    return manifest.spec


def steps_of(spec: StagedFineTuneSpec) -> list[Step]:
    plan = make_plan(spec, FACTS)
    assert not isinstance(plan, list)
    return [PREPARE, *steps_after_prepare(plan.stages)]


def file_of(task: str, spec: StagedFineTuneSpec) -> StageConfig:
    steps = steps_of(spec)
    return build_stage_file(
        OWNER,
        spec,
        next(step for step in steps if step.key == task),
        facts=None if task == "prepare" else FACTS,
        stages=[step.stage for step in steps if step.stage is not None],
        digests=["c" * 64, "d" * 64],
    )


def job_of(
    task: str, edits: Mapping[str, Any] | None = None, settings: Settings = SETTINGS
) -> Object:
    spec = spec_of(edits)
    assert spec.storage is not None
    order = JobOrder(
        config=file_of(task, spec),
        task=task,
        attempt=2,
        claim=claim_name(OWNER, spec.storage),
        inputs={} if task == "prepare" else {"prepare": "finance-qa-prepare"},
        preferred_node="node-1",
    )
    return build_job(OWNER, spec, settings, order)


def pod_of(job: Object) -> Object:
    pod: Object = job["spec"]["template"]["spec"]
    return pod


def mounts_of(job: Object) -> dict[str, tuple[str, bool]]:
    """Return what is mounted by its path: the volume's name and whether it is read-only."""
    (container,) = pod_of(job)["containers"]
    return {
        mount["mountPath"]: (mount["name"], mount.get("readOnly", False))
        for mount in container["volumeMounts"]
    }


def claims_of(job: Object) -> list[str]:
    return [
        volume["persistentVolumeClaim"]["claimName"]
        for volume in pod_of(job)["volumes"]
        if "persistentVolumeClaim" in volume
    ]


def test_job_is_that_of_the_golden_file_to_the_last_field() -> None:
    job = job_of("prepare")
    annotations = job["spec"]["template"]["metadata"]["annotations"]
    given = StageConfig.model_validate_json(annotations[names.ANNOTATION_STAGE_CONFIG])
    assert given == file_of("prepare", spec_of())
    annotations[names.ANNOTATION_STAGE_CONFIG] = "the stage file"
    digest = job["metadata"]["annotations"][names.ANNOTATION_CONFIG_DIGEST]
    assert digest == config_digest(given)
    job["metadata"]["annotations"][names.ANNOTATION_CONFIG_DIGEST] = "its digest"
    assert job == YAML(typ="safe").load(GOLDEN)


@pytest.mark.parametrize("task", TASKS)
def test_job_of_each_task_is_one_that_kubernetes_knows(task: str) -> None:
    kubernetes_validate.validate(job_of(task), "1.37", strict=True)
    kubernetes_validate.validate(job_of(task, {"spec.runtime": None}), "1.37", strict=True)


@pytest.mark.parametrize("task", TASKS)
def test_pod_keeps_to_the_restricted_pod_security_level(task: str) -> None:
    pod = pod_of(job_of(task))
    assert not {"hostNetwork", "hostPID", "hostIPC", "nodeName", "initContainers"} & pod.keys()
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] > 0
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    kinds = {kind for volume in pod["volumes"] for kind in volume if kind != "name"}
    assert kinds <= {"persistentVolumeClaim", "emptyDir", "downwardAPI", "projected", "secret"}
    (container,) = pod["containers"]
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert all("hostPort" not in port for port in container["ports"])


@pytest.mark.parametrize("task", TASKS)
def test_only_token_of_a_pod_is_for_posting_progress(task: str) -> None:
    pod = pod_of(job_of(task))
    assert pod["automountServiceAccountToken"] is False
    tokens = [volume["projected"]["sources"] for volume in pod["volumes"] if "projected" in volume]
    (((source,)),) = tokens
    assert source["serviceAccountToken"]["audience"] == names.PROGRESS_AUDIENCE
    quiet = SETTINGS.model_copy(update={"progress_url": ""})
    volumes = pod_of(job_of(task, settings=quiet))["volumes"]
    assert not [volume for volume in volumes if "projected" in volume]


@pytest.mark.parametrize("task", TASKS)
def test_hub_tokens_are_files_of_prepare_and_never_in_an_environment(task: str) -> None:
    job = job_of(task)
    (container,) = pod_of(job)["containers"]
    assert all(set(variable) == {"name", "value"} for variable in container["env"])
    assert "envFrom" not in container
    secrets = [volume["secret"] for volume in pod_of(job)["volumes"] if "secret" in volume]
    if task != "prepare":
        assert secrets == []
        return
    assert [secret["secretName"] for secret in secrets] == ["model-hub", "data-hub"]
    assert all(secret["items"] == [{"key": "token", "path": "token"}] for secret in secrets)
    assert mounts_of(job)["/etc/stagetune/secrets/model"] == ("model-token", True)


@pytest.mark.parametrize("task", TASKS)
def test_only_the_run_s_own_claim_can_be_written_to(task: str) -> None:
    mounts = mounts_of(job_of(task))
    writable = {path for path, (_, read_only) in mounts.items() if not read_only}
    models = {names.MODELS_MOUNT} if task == "prepare" else set()
    assert writable == {names.VOLUME_MOUNT, "/tmp", "/dev/shm"} | models
    sources = {"/stagetune-claims/rows", "/stagetune-claims/texts"}
    assert (sources <= mounts.keys()) == (task == "prepare")


@pytest.mark.parametrize("models", ["rows", "finance-qa-0c4a3e62", "texts"])
def test_claim_that_is_named_twice_is_one_volume(models: str) -> None:
    edits = {
        "spec.storage": {"size": "1Gi", "modelsClaimName": models},
        "spec.model": {"source": "pvc://finance-qa-0c4a3e62/base"},
    }
    for task in TASKS:
        job = job_of(task, edits)
        assert len(claims_of(job)) == len(set(claims_of(job)))
        names_of_volumes = [volume["name"] for volume in pod_of(job)["volumes"]]
        assert {name for name, _ in mounts_of(job).values()} == set(names_of_volumes)
    mounts = mounts_of(job_of("prepare", edits))
    assert mounts[names.MODELS_MOUNT][1] is False
    assert mounts[f"{names.CLAIMS_MOUNT}/rows"][1] is True
    assert mounts[f"{names.CLAIMS_MOUNT}/finance-qa-0c4a3e62"] == ("run", True)


@pytest.mark.parametrize("task", TASKS)
def test_gpu_and_hub_are_for_those_who_need_them(task: str) -> None:
    (container,) = pod_of(job_of(task))["containers"]
    needs_gpu = task not in ("prepare", "export")
    assert ("nvidia.com/gpu" in container["resources"]["limits"]) == needs_gpu
    environment = {variable["name"]: variable["value"] for variable in container["env"]}
    assert (environment.get("HF_HUB_OFFLINE") == "1") == (task != "prepare")
    assert environment[names.PROGRESS_URL_VARIABLE] == (
        "http://stagetune.stagetune-system:8080/apis/stagetune.io/v1alpha1/namespaces/team-a/runs/"
        f"finance-qa/tasks/{task}/progress"
    )


def test_job_makes_another_pod_for_a_disrupted_one_and_for_no_other() -> None:
    spec = job_of("01-layers-0-1")["spec"]
    assert (spec["backoffLimit"], spec["podReplacementPolicy"]) == (0, "Failed")
    rules = spec["podFailurePolicy"]["rules"]
    assert [rule["action"] for rule in rules] == ["Ignore", "Ignore"]
    assert rules[1]["onExitCodes"]["values"] == [names.TrainerExitCode.INTERRUPTED]
    assert rules[1]["onExitCodes"]["containerName"] == names.TRAINER_CONTAINER
    assert spec["template"]["spec"]["restartPolicy"] == "Never"


def test_queue_is_named_on_the_job_and_not_on_its_pod() -> None:
    job = job_of("prepare")
    assert job["spec"]["suspend"] is True
    assert job["metadata"]["labels"][names.LABEL_QUEUE] == "team-a"
    assert names.LABEL_QUEUE not in job["spec"]["template"]["metadata"]["labels"]
    assert job_of("prepare", {"spec.runtime": None})["spec"]["suspend"] is False


@pytest.mark.parametrize("attempt", [1, 9, 10, 99, 100, 10000])
@pytest.mark.parametrize("task", ["prepare", "99-" + "s" * 16, "128-" + "s" * 16])
def test_job_s_name_fits_a_label_for_every_attempt(task: str, attempt: int) -> None:
    run = "r" * names.RUN_NAME_MAX_LENGTH
    name = job_name(run, task, attempt)
    assert len(name) <= 63
    assert name.startswith("r" * 30)
    known = {job_name(run, other, number) for other in TASKS for number in range(1, 200)}
    assert name not in known or task == "prepare"


def test_ordinary_job_name_says_run_task_and_attempt() -> None:
    assert job_name("finance-qa", "01-layers-0-7", 1) == "finance-qa-01-layers-0-7"
    assert job_name("finance-qa", "01-layers-0-7", 100) == "finance-qa-01-layers-0-7-100"


def test_stage_file_of_the_largest_run_fits_its_annotation() -> None:
    edits = {
        "spec.model": {"source": "hf://org/name", "chatTemplate": "ß" * 32768},
        "spec.schedule": None,
        "spec.stages": [
            {"name": f"{number:03d}-{'s' * 12}", "layers": {"first": 0, "last": 3}}
            for number in range(128)
        ],
    }
    spec = spec_of(edits)
    steps = steps_of(spec)
    config = build_stage_file(
        OWNER,
        spec,
        steps[-1],
        facts=FACTS,
        stages=[step.stage for step in steps if step.stage is not None],
        digests=["c" * 64] * 128,
    )
    assert len(config.model_dump_json(exclude_none=True).encode()) < 256 * 1024 - 4096


def test_field_that_a_newer_version_adds_is_no_edit() -> None:
    """The server fills new defaults in, so what was left out before is written out from then on."""
    spec = spec_of({"spec.training": {"learningRate": 1e-4}})
    filled = spec_of({"spec.training": {"learningRate": 1e-4, "batchSize": 16, "seed": 42}})
    edited_spec = spec_of({"spec.training": {"learningRate": 1e-4, "batchSize": 8}})
    assert digest_of_planned(spec) == digest_of_planned(filled) != digest_of_planned(edited_spec)
    protected = spec_of({"spec.protection": {"anchor": {"weight": 1}}})
    assert digest_of_planned(spec) != digest_of_planned(protected)
    bare, full, other = (config_digest(file_of("prepare", s)) for s in (spec, filled, edited_spec))
    assert bare == full != other
    # A key with its default would be there in what a newer version digests.
    assert "prefix_cache" not in spec.training.model_dump(exclude_defaults=True)


@pytest.mark.parametrize(("retain", "is_owned"), [("Result", False), ("Nothing", True)])
def test_claim_says_whose_it_is_and_goes_with_the_run_only_on_demand(
    retain: str, is_owned: bool
) -> None:
    storage = spec_of({"spec.storage": {"size": "1Gi", "retain": retain}}).storage
    assert storage is not None
    claim = build_claim(OWNER, storage)
    kubernetes_validate.validate(claim, "1.37", strict=True)
    assert claim["metadata"]["annotations"] == {names.ANNOTATION_RUN_UID: OWNER.uid}
    assert ("ownerReferences" in claim["metadata"]) == is_owned


SEVERAL_NODES = {
    "spec.runtime": {"nodes": 12, "resources": {"limits": {"nvidia.com/gpu": 1}}},
    "spec.storage": {"size": "1Gi", "accessMode": "ReadWriteMany"},
    "spec.training.batchSize": 64,
}


def test_job_and_service_of_several_nodes_are_as_kubernetes_wants_them() -> None:
    job, service = job_of("01-layers-0-1", SEVERAL_NODES), build_service(OWNER)
    for manifest in (job, service):
        kubernetes_validate.validate(manifest, "1.37", strict=True)
    assert service["metadata"]["ownerReferences"] == [OWNER.reference]
    assert job["spec"]["completions"] == 12


def test_host_names_of_pods_are_short_enough() -> None:
    run, task = "r" * names.RUN_NAME_MAX_LENGTH, "01-" + "s" * names.STAGE_NAME_MAX_LENGTH
    for attempt in (1, 2, 99, 100):
        name = job_name(run, task, attempt, num_pods=64)
        assert len(f"{name}-63") <= 63
    assert job_name(run, task, 1, num_pods=64) == f"{run}-{task}"
