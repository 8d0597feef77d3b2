"""The pod of a Job: its container, its volumes, and what it may do.

Security is decided here and not in the manifest: pods pass the `restricted` Pod Security level, run
under one fixed account, and get no token but the one that progress is posted with.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from stagetune_api import names
from stagetune_api.spec import Quantity, RuntimeSpec, StagedFineTuneSpec
from stagetune_api.spec_checks import sources_of
from stagetune_api.stage import StageConfig, Task
from stagetune_operator.ownership import Owner
from stagetune_operator.settings import Settings
from stagetune_operator.views import Object

_SHARED_MEMORY = "dshm"
_RUN_VOLUME, _MODELS_VOLUME, _TASK_VOLUME = "run", "models", "task"
_TMP_VOLUME, _TOKEN_VOLUME = "tmp", "progress-token"
_TOKEN_SECONDS = 3600


@dataclass(frozen=True, kw_only=True)
class JobOrder:
    """Everything that one Job is made of, beside the run's spec and the operator's settings."""

    config: StageConfig
    task: str
    attempt: int
    claim: str
    inputs: Mapping[str, str] = field(default_factory=dict)
    preferred_node: str | None = None
    coordinator: str | None = None
    """Name of the first of several pods; None where there is one."""
    standby_node: str | None = None
    """The node on which the pod stands by, since its task is not due yet; None where it is."""


def build_pod_spec(
    owner: Owner, spec: StagedFineTuneSpec, settings: Settings, order: JobOrder
) -> Object:
    """Return the spec of the pod that does one task of a run."""
    runtime = spec.runtime or RuntimeSpec()
    volumes, mounts = _volumes(spec, settings, order)
    user = settings.trainer_user_id
    pod: Object = {
        "restartPolicy": "Never",
        "serviceAccountName": settings.trainer_service_account,
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": runtime.grace_period_seconds,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": user,
            "runAsGroup": user,
            "fsGroup": user,
            # Without this every pod would walk over the whole volume before it starts.
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [_container(owner, spec, settings, order, mounts)],
        "volumes": volumes,
    }
    if settings.image_pull_secrets:
        pod["imagePullSecrets"] = [{"name": name} for name in settings.image_pull_secrets]
    if order.standby_node is not None:
        pod["affinity"] = _require_node(order.standby_node)
    elif order.preferred_node is not None:
        pod["affinity"] = _prefer_node(order.preferred_node)
    if runtime.priority_class_name is not None:
        pod["priorityClassName"] = runtime.priority_class_name
    if runtime.node_selector:
        pod["nodeSelector"] = dict(runtime.node_selector)
    if runtime.tolerations:
        pod["tolerations"] = [
            item.model_dump(mode="json", exclude_none=True) for item in runtime.tolerations
        ]
    return pod


def _container(
    owner: Owner,
    spec: StagedFineTuneSpec,
    settings: Settings,
    order: JobOrder,
    mounts: list[Object],
) -> Object:
    return {
        "name": names.TRAINER_CONTAINER,
        "image": settings.trainer_image,
        "imagePullPolicy": settings.image_pull_policy.value,
        "args": [
            f"{names.TASK_MOUNT}/{names.STAGE_CONFIG_FILE}",
            "--termination-message=/dev/termination-log",
            f"--metrics-port={names.TRAINER_METRICS_PORT}",
            *_standby_arguments(owner, settings, order),
        ],
        "env": _environment(owner, settings, order),
        "ports": [{"name": "metrics", "containerPort": names.TRAINER_METRICS_PORT}],
        "resources": _resources(spec, order.config.task),
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        # A process that dies without a report leaves the end of its log.
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "volumeMounts": mounts,
    }


def _standby_arguments(owner: Owner, settings: Settings, order: JobOrder) -> list[str]:
    if order.standby_node is None:
        return []
    return [f"--await={_task_url(owner, settings, order)}/stage"]


def _task_url(owner: Owner, settings: Settings, order: JobOrder) -> str:
    """Return the address of the task at the operator."""
    return (
        f"{settings.progress_url.rstrip('/')}/apis/{names.API_VERSION}/namespaces/"
        f"{owner.namespace}/runs/{owner.name}/tasks/{order.task}"
    )


def _environment(owner: Owner, settings: Settings, order: JobOrder) -> list[Object]:
    values = {
        "HOME": "/tmp",
        # Threads that spin take the processor from whoever shares the node.
        "OMP_WAIT_POLICY": "PASSIVE",
        "POD_NAMESPACE": owner.namespace,
    }
    if order.config.task is Task.PREPARE:
        values[names.SECRETS_DIRECTORY_VARIABLE] = names.SECRETS_MOUNT
    else:
        # Everything is on the volume by now; nothing may depend on a hub any more.
        values["HF_HUB_OFFLINE"] = "1"
    if order.coordinator is not None:
        values[names.COORDINATOR_VARIABLE] = order.coordinator
    if settings.progress_url:
        values[names.PROGRESS_URL_VARIABLE] = f"{_task_url(owner, settings, order)}/progress"
        values[names.PROGRESS_TOKEN_VARIABLE] = f"{names.PROGRESS_TOKEN_MOUNT}/token"
    return [{"name": name, "value": value} for name, value in values.items()]


def _resources(spec: StagedFineTuneSpec, task: Task) -> Object:
    """Return the container's resources; preparing and exporting take no extended ones."""
    if spec.runtime is None or spec.runtime.resources is None:
        return {}
    resources = spec.runtime.resources
    found: Object = {}
    for kind, amounts in (("limits", resources.limits), ("requests", resources.requests)):
        taken = {
            name: _quantity(amount)
            for name, amount in amounts.items()
            if "/" not in name or task in (Task.TRAIN, Task.EVALUATE)
        }
        if taken:
            found[kind] = taken
    return found


def _quantity(amount: Quantity) -> str:
    return str(amount)


def _volumes(
    spec: StagedFineTuneSpec, settings: Settings, order: JobOrder
) -> tuple[list[Object], list[Object]]:
    """Return the pod's volumes and where its container mounts them."""
    task = order.config.task
    volumes: list[Object] = [
        {"name": _RUN_VOLUME, "persistentVolumeClaim": {"claimName": order.claim}},
        {"name": _TMP_VOLUME, "emptyDir": {}},
        {"name": _SHARED_MEMORY, "emptyDir": {"medium": "Memory"}},
        {"name": _TASK_VOLUME, "downwardAPI": {"items": [_stage_file_item()]}},
    ]
    mounts: list[Object] = [
        {"name": _RUN_VOLUME, "mountPath": names.VOLUME_MOUNT},
        {"name": _TMP_VOLUME, "mountPath": "/tmp"},
        {"name": _SHARED_MEMORY, "mountPath": "/dev/shm"},
        {"name": _TASK_VOLUME, "mountPath": names.TASK_MOUNT, "readOnly": True},
    ]
    storage = spec.storage
    if storage is not None and storage.models_claim_name is not None:
        name = _claim_volume(volumes, storage.models_claim_name, _MODELS_VOLUME)
        mount: Object = {"name": name, "mountPath": names.MODELS_MOUNT}
        mounts.append(mount if task is Task.PREPARE else {**mount, "readOnly": True})
    if settings.progress_url:
        volumes.append({"name": _TOKEN_VOLUME, "projected": {"sources": [_progress_token()]}})
        mounts.append(
            {"name": _TOKEN_VOLUME, "mountPath": names.PROGRESS_TOKEN_MOUNT, "readOnly": True}
        )
    if task is Task.PREPARE:
        _add_sources(spec, volumes, mounts)
        _add_secrets(spec, volumes, mounts)
    return volumes, mounts


def _stage_file_item() -> Object:
    path = f"metadata.annotations['{names.ANNOTATION_STAGE_CONFIG}']"
    return {"path": names.STAGE_CONFIG_FILE, "fieldRef": {"fieldPath": path}}


def _progress_token() -> Object:
    return {
        "serviceAccountToken": {
            "audience": names.PROGRESS_AUDIENCE,
            "expirationSeconds": _TOKEN_SECONDS,
            "path": "token",
        }
    }


def _claim_volume(volumes: list[Object], claim: str, name: str, *, read_only: bool = False) -> str:
    """Return the name of the volume of `claim`, which is added as `name` if there is none yet.

    A pod with two volumes of one claim does not start (kubernetes/kubernetes#132921).
    """
    for volume in volumes:
        if volume.get("persistentVolumeClaim", {}).get("claimName") == claim:
            found: str = volume["name"]
            return found
    source: Object = {"claimName": claim, **({"readOnly": True} if read_only else {})}
    volumes.append({"name": name, "persistentVolumeClaim": source})
    return name


def _add_sources(spec: StagedFineTuneSpec, volumes: list[Object], mounts: list[Object]) -> None:
    """Mount every claim of a pvc:// source read-only, by its name."""
    claims = {
        source.removeprefix("pvc://").split("/", 1)[0]
        for source in sources_of(spec).values()
        if source.startswith("pvc://")
    }
    for number, claim in enumerate(sorted(claims)):
        name = _claim_volume(volumes, claim, f"source-{number}", read_only=True)
        path = f"{names.CLAIMS_MOUNT}/{claim}"
        mounts.append({"name": name, "mountPath": path, "readOnly": True})


def _add_secrets(spec: StagedFineTuneSpec, volumes: list[Object], mounts: list[Object]) -> None:
    """Mount the hub tokens as files: a new token counts for the next pod, and no environment shows
    it."""
    for part, secret in (("model", spec.model.secret_name), ("dataset", spec.dataset.secret_name)):
        if secret is None:
            continue
        name = f"{part}-token"
        items = [{"key": names.TOKEN_KEY, "path": names.TOKEN_KEY}]
        content = {"secretName": secret, "items": items, "defaultMode": 0o440}
        volumes.append({"name": name, "secret": content})
        path = f"{names.SECRETS_MOUNT}/{part}"
        mounts.append({"name": name, "mountPath": path, "readOnly": True})


def _prefer_node(node: str) -> Object:
    """Return the wish for a node: that of the stage before has the volume and warm caches."""
    term = {"weight": 100, "preference": _is_node(node)}
    return {"nodeAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": [term]}}


def _require_node(node: str) -> Object:
    """Return the demand for a node: no other is started for a pod that only stands by."""
    terms = {"nodeSelectorTerms": [_is_node(node)]}
    return {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": terms}}


def _is_node(node: str) -> Object:
    return {"matchFields": [{"key": "metadata.name", "operator": "In", "values": [node]}]}
