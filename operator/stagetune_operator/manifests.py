"""Builders: from values to the objects that the operator creates. Pure, and nothing is read."""

import json
from collections.abc import Mapping
from dataclasses import replace

from stagetune_api import names
from stagetune_api.artifact import digest_of_json
from stagetune_api.names import TrainerExitCode
from stagetune_api.spec import RetainPolicy, StagedFineTuneSpec, StorageSpec
from stagetune_api.stage import StageConfig, Task
from stagetune_operator.ownership import Owner
from stagetune_operator.pod_template import JobOrder, build_pod_spec
from stagetune_operator.settings import Settings
from stagetune_operator.views import Object

_JOB_NAME_MAX_LENGTH = 63


def claim_name(owner: Owner, storage: StorageSpec) -> str:
    """Return the name of the claim with the run's files."""
    return storage.claim_name or f"{owner.name}-{owner.uid[:8]}"


def config_digest(config: StageConfig) -> str:
    """Return the digest by which a Job's stage file is compared with the one wanted now.

    Defaults are left out, so that a field which a newer version adds is not an edit.
    """
    return digest_of_json(config.model_dump(mode="json", exclude_defaults=True))


def job_name(run: str, task: str, attempt: int, *, num_pods: int = 1) -> str:
    """Return the name of the Job, short enough for the label by which Kubernetes counts its pods.

    Only the hundredth attempt of a task with the longest names has to be cut. Of several pods each
    has its number behind it as the name of its host.
    """
    longest = _JOB_NAME_MAX_LENGTH - (len(f"-{num_pods}") if num_pods > 1 else 0)
    name = f"{run}-{task}" if attempt == 1 else f"{run}-{task}-{attempt}"
    if len(name) <= longest:
        return name
    end = f"-{digest_of_json(name)[:8]}-{attempt}"
    return name[: longest - len(end)].rstrip("-") + end


def service_name(owner: Owner) -> str:
    """Return the name of the Service by which pods of one stage find each other."""
    # Names of Services begin with a letter, and a run's name need not.
    return f"stagetune-{owner.name}"


def build_service(owner: Owner) -> Object:
    """Return the headless Service that gives the run's training pods their names."""
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": _metadata(owner, service_name(owner), {}),
        "spec": {
            "clusterIP": "None",
            "selector": {
                names.LABEL_RUN: owner.name,
                "app.kubernetes.io/component": "trainer",
            },
            # They have to meet before any of them could be called ready.
            "publishNotReadyAddresses": True,
        },
    }


def build_claim(owner: Owner, storage: StorageSpec) -> Object:
    """Return the claim that is made for a run.

    Only with `retain: Nothing` it belongs to the run's object and goes with it.
    """
    spec: Object = {
        "accessModes": [storage.access_mode.value],
        "resources": {"requests": {"storage": storage.size}},
    }
    if storage.storage_class_name is not None:
        spec["storageClassName"] = storage.storage_class_name
    metadata = _metadata(owner, claim_name(owner, storage), {})
    if storage.retain is not RetainPolicy.NOTHING:
        del metadata["ownerReferences"]
    metadata["annotations"] = {names.ANNOTATION_RUN_UID: owner.uid}
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": metadata,
        "spec": spec,
    }


def build_plan_record(owner: Owner, name: str, data: Mapping[str, str]) -> Object:
    """Return the immutable ConfigMap that keeps a plan."""
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": _metadata(owner, name, {}),
        "immutable": True,
        "data": dict(data),
    }


def build_job(
    owner: Owner, spec: StagedFineTuneSpec, settings: Settings, order: JobOrder
) -> Object:
    """Return the Job for one task of a run."""
    labels = {
        names.LABEL_TASK: order.task,
        names.LABEL_ATTEMPT: str(order.attempt),
        "app.kubernetes.io/component": "trainer",
    }
    queue = spec.runtime.queue_name if spec.runtime else None
    num_pods = order.config.engine.nodes if order.config.engine is not None else 1
    name = job_name(owner.name, order.task, order.attempt, num_pods=num_pods)
    metadata = _metadata(owner, name, labels)
    pod_labels = dict(metadata["labels"])
    if queue is not None:
        # Of the Job alone: with it a queue for plain pods would hold the pod back as well.
        metadata["labels"][names.LABEL_QUEUE] = queue
    annotations = {
        names.ANNOTATION_CONFIG_DIGEST: config_digest(order.config),
        names.ANNOTATION_INPUTS: json.dumps(dict(order.inputs), sort_keys=True),
    }
    if order.config.task in (Task.TRAIN, Task.EVALUATE):
        micro_batch_size = order.config.training.micro_batch_size
        annotations[names.ANNOTATION_MICRO_BATCH_SIZE] = str(micro_batch_size)
    metadata["annotations"] = annotations
    pod_metadata = {
        "labels": pod_labels,
        "annotations": {
            names.ANNOTATION_STAGE_CONFIG: order.config.model_dump_json(exclude_none=True)
        },
    }
    if num_pods > 1:
        order = replace(order, coordinator=f"{name}-0.{service_name(owner)}")
    template = {
        "metadata": pod_metadata,
        "spec": {
            **build_pod_spec(owner, spec, settings, order),
            **({"subdomain": service_name(owner)} if num_pods > 1 else {}),
        },
    }
    if order.standby_node is not None:
        annotations[names.ANNOTATION_FORECAST_DIGEST] = digest_of_json(template)
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": metadata,
        "spec": {
            # Retries are the operator's: another attempt may need another file.
            "backoffLimit": 0,
            "completions": num_pods,
            "parallelism": num_pods,
            **({"completionMode": "Indexed"} if num_pods > 1 else {}),
            "podReplacementPolicy": "Failed",
            "podFailurePolicy": _pod_failure_policy(),
            # A queue admits the Job by ending its suspension.
            "suspend": queue is not None,
            "template": template,
        },
    }


def _metadata(owner: Owner, name: str, labels: Mapping[str, str]) -> Object:
    return {
        "name": name,
        "namespace": owner.namespace,
        "labels": {
            "app.kubernetes.io/name": "stagetune",
            "app.kubernetes.io/instance": owner.name,
            names.LABEL_MANAGED_BY: names.MANAGED_BY,
            names.LABEL_RUN: owner.name,
            **labels,
        },
        "ownerReferences": [owner.reference],
    }


def _pod_failure_policy() -> Object:
    """Return which ends of a pod are not failures: the Job then makes another one."""
    asked_to_stop = {
        "containerName": names.TRAINER_CONTAINER,
        "operator": "In",
        "values": [int(TrainerExitCode.INTERRUPTED)],
    }
    disrupted = [{"type": "DisruptionTarget", "status": "True"}]
    return {
        "rules": [
            {"action": "Ignore", "onPodConditions": disrupted},
            {"action": "Ignore", "onExitCodes": asked_to_stop},
        ]
    }
