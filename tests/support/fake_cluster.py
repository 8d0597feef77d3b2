"""A cluster in memory, for faults and speed: what the API server promises, and faults on demand.

It keeps what the real one keeps (uids, resource versions, name conflicts, status writes that are
guarded), makes pods for Jobs, and runs them by a script. `tests/control_plane` has the real one.
"""

import copy
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from stagetune_api import names
from stagetune_api.facts import DataFacts, Facts, LayerFacts, ModelFacts
from stagetune_api.names import TrainerExitCode
from stagetune_api.report import (
    CheckpointRef,
    EvaluationResult,
    Failure,
    FailureClass,
    ModelScores,
    Outcome,
    StageReport,
    TrainResult,
)
from stagetune_api.stage import StageConfig, Task
from stagetune_operator.errors import (
    AlreadyExistsError,
    ConflictError,
    DeniedError,
    GoneError,
)
from stagetune_operator.keys import RunKey
from stagetune_operator.views import Object

FACTS = Facts(
    model=ModelFacts(
        model_type="llama",
        num_layers=4,
        hidden_size=64,
        intermediate_size=128,
        vocab_size=256,
        num_attention_heads=4,
        head_dim=16,
        tied_embeddings=True,
        layer=LayerFacts(parameters=41088, linear_shapes={"q_proj": (64, 64)}),
        embedding_parameters=16384,
        head_parameters=0,
        final_norm_parameters=64,
        dtype_bytes=4,
        digest="a" * 64,
    ),
    data=DataFacts(
        train_rows=64,
        validation_rows=8,
        train_tokens=4096,
        train_answer_tokens=1024,
        max_row_tokens=64,
        digest="b" * 64,
    ),
    model_directory="/stagetune/models/0123456789abcdef",
)


class CrashError(BaseException):
    """The operator is gone in the middle of what it did; nothing of it can catch this."""


@dataclass(frozen=True, kw_only=True)
class Ending:
    """How a pod ends."""

    exit_code: int = 0
    message: str = ""
    reason: str = ""
    is_disrupted: bool = False


Script = Callable[[StageConfig, Object], Ending]
"""From the stage file of a pod and the pod to how it ends."""


def succeeds(config: StageConfig, pod: Object) -> Ending:
    """Return the ending of a task that did what it was asked."""
    return Ending(message=report_for(config).termination_message())


def fails(
    failure_class: FailureClass,
    code: TrainerExitCode,
    message: str = "it failed",
    artifact: str | None = None,
) -> Script:
    """Return the script of a task that fails with a report."""

    def script(config: StageConfig, pod: Object) -> Ending:
        failure = Failure(
            failure_class=failure_class,
            exit_code=int(code),
            message=message,
            artifact=artifact,
        )
        report = report_for(config).model_copy(
            update={
                "outcome": Outcome.FAILED,
                "failure": failure,
                "facts": None,
                "output": None,
                "train": None,
                "evaluation": None,
            }
        )
        return Ending(exit_code=int(code), message=report.termination_message())

    return script


def report_for(config: StageConfig, *, digest: str | None = None) -> StageReport:
    """Return the report of a trainer that did the task of `config`."""
    name = config.stage.name if config.stage else config.task.value.lower()
    values: dict[str, Any] = {}
    match config.task:
        case Task.PREPARE:
            values["facts"] = FACTS
        case Task.TRAIN if config.stage is not None:
            folder = f"{config.run_directory}/stages/{config.stage.directory}/output"
            marks = digest or f"{config.stage.index + 1:x}".rjust(64, "c")
            values["output"] = CheckpointRef(path=folder, digest=marks, step=config.stage.steps)
            values["train"] = TrainResult(
                steps=config.stage.steps,
                planned_steps=config.stage.steps,
                stopped_early=False,
                best_step=config.stage.steps,
                loss=1.5,
                initial_validation_loss=2.0,
                validation_loss=1.0,
                trainable_parameters=1000,
                tokens=4096,
                tokens_per_second=100.0,
                train_seconds=4.0,
            )
        case Task.EVALUATE:
            scores = ModelScores(validation_loss=1.0)
            values["evaluation"] = EvaluationResult(
                before=scores, after=scores, exact_match_rows=0, samples=[]
            )
        case Task.EXPORT:
            values["export"] = f"{config.run_directory}/export"
    return StageReport(
        task=config.task,
        name=name,
        attempt=max(config.attempt, 1),
        outcome=Outcome.SUCCEEDED,
        seconds=5.0,
        peak_memory_bytes=1 << 20,
        **values,
    )


def stands_by(pod: Object) -> bool:
    """Whether the pod was started before its task was due."""
    (container,) = pod["spec"]["containers"]
    return any(argument.startswith("--await=") for argument in container["args"])


@dataclass
class FakeCluster:
    """The API server, the Job controller and a kubelet, one step at a time.

    It is a `ClusterPort` and a `StorePort` at once: a snapshot is what is there, unless `stale`
    says otherwise.
    """

    crash_at: int | None = None
    """Number of the write at which the operator is gone, from 1."""
    crash_after: bool = False
    """Whether that write is still done."""
    deny: Callable[[Object], str | None] = lambda manifest: None
    """From a manifest to why it may not be created."""
    objects: dict[tuple[str, str], Object] = field(default_factory=dict)
    events: list[tuple[str, str, str]] = field(default_factory=list)
    writes: list[tuple[str, str]] = field(default_factory=list)
    stale: Sequence[Object] | None = None
    """Objects that the watches still believe in."""
    are_jobs_late: bool = False
    """Whether Jobs have yet to take note of how their pods ended."""
    stage_file_for: Callable[[str], str | None] = lambda pod_uid: None
    """What a pod that stands by is given, by its uid."""
    keep_deleted: bool = False
    """Whether a deleted Job stays until its pods are gone, as with a long time to leave."""
    _numbers: Any = field(default_factory=lambda: itertools.count(1))
    _unsettled: list[tuple[Object, Ending]] = field(default_factory=list)
    """Jobs with a pod that has ended, and how it did."""

    def add_run(self, manifest: Object) -> Object:
        """Put a run there as `kubectl apply` does."""
        run = self._stored(manifest)
        run["metadata"]["generation"] = 1
        self.objects["StagedFineTune", run["metadata"]["name"]] = run
        return run

    def edit_run(self, name: str, change: Callable[[Object], None]) -> None:
        """Change the spec of a run as a user does."""
        run = self.objects["StagedFineTune", name]
        change(run["spec"])
        run["metadata"]["generation"] += 1
        run["metadata"]["resourceVersion"] = str(next(self._numbers))

    def of_kind(self, kind: str) -> list[Object]:
        """Return copies of all objects of `kind`, in the order in which they were made."""
        return [copy.deepcopy(item) for (found, _), item in self.objects.items() if found == kind]

    def run(self, name: str = "finance-qa") -> Object:
        """Return the run as it is."""
        return copy.deepcopy(self.objects["StagedFineTune", name])

    def advance(self, script: Script | Mapping[str, Script] = succeeds) -> bool:
        """Run every pending pod to its end by `script`; return whether there was one.

        A mapping has a script for each task's label; tasks that are not in it succeed.
        """
        moved = self._settle_jobs() or self._start_pods()
        self.give_files()
        for pod in [item for (kind, _), item in self.objects.items() if kind == "Pod"]:
            if pod["status"]["phase"] != "Running":
                continue
            task = pod["metadata"]["labels"][names.LABEL_TASK]
            chosen = script.get(task, succeeds) if isinstance(script, Mapping) else script
            if stands_by(pod):
                continue
            text = pod["metadata"]["annotations"][names.ANNOTATION_STAGE_CONFIG]
            self._end_pod(pod, chosen(StageConfig.model_validate_json(text), pod))
            moved = True
        self._settle_jobs()
        return moved

    def give_files(self) -> None:
        """Give every pod that stands by the file that it is offered, which it begins with."""
        for (kind, _), pod in self.objects.items():
            if kind == "Pod" and stands_by(pod):
                text = self.stage_file_for(pod["metadata"]["uid"])
                if text is not None:
                    pod["metadata"]["annotations"][names.ANNOTATION_STAGE_CONFIG] = text
                    pod["spec"]["containers"][0]["args"] = []

    def drain(self, task: str) -> None:
        """Delete the pods at `task`, as a drained node does; their Job makes others."""
        for key, pod in list(self.objects.items()):
            if key[0] == "Pod" and pod["metadata"]["labels"][names.LABEL_TASK] == task:
                del self.objects[key]

    def start_pods(self) -> None:
        """Let every Job's pod start, and none end."""
        self._start_pods()

    def _start_pods(self) -> bool:
        moved = False
        for (kind, name), job in list(self.objects.items()):
            status = job.setdefault("status", {}) if kind == "Job" else {}
            is_leaving = "deletionTimestamp" in job["metadata"]
            if kind != "Job" or status.get("conditions") or job["spec"]["suspend"] or is_leaving:
                continue
            running = [
                item
                for (found, _), item in self.objects.items()
                if found == "Pod"
                and item["status"]["phase"] in ("Pending", "Running")
                and item["metadata"]["ownerReferences"][0]["uid"] == job["metadata"]["uid"]
            ]
            unsettled = any(item is job for item, _ in self._unsettled)
            if not running and not unsettled:
                for index in range(job["spec"]["completions"]):
                    self._make_pod(name, job, index)
                moved = True
        return moved

    def _make_pod(self, name: str, job: Object, index: int = 0) -> None:
        template = copy.deepcopy(job["spec"]["template"])
        if job["spec"].get("completionMode") == "Indexed":
            template["metadata"]["labels"][names.LABEL_POD_INDEX] = str(index)
        pod = self._stored(
            {
                "kind": "Pod",
                "metadata": {
                    "name": f"{name}-{next(self._numbers)}",
                    "namespace": job["metadata"]["namespace"],
                    "ownerReferences": [{"uid": job["metadata"]["uid"], "controller": True}],
                    **copy.deepcopy(template["metadata"]),
                },
                "spec": {"nodeName": "node-1", "containers": template["spec"]["containers"]},
            }
        )
        state = {"running": {"startedAt": self._time()}}
        container = {"name": names.TRAINER_CONTAINER, "state": state}
        pod["status"] = {"phase": "Running", "containerStatuses": [container]}
        self.objects["Pod", pod["metadata"]["name"]] = pod

    def _end_pod(self, pod: Object, ending: Ending) -> None:
        status = pod["status"]
        state = status["containerStatuses"][0]["state"]
        state["terminated"] = {
            "startedAt": state.pop("running")["startedAt"],
            "finishedAt": self._time(),
            "exitCode": ending.exit_code,
            "reason": ending.reason,
            "message": ending.message,
        }
        status["phase"] = "Succeeded" if ending.exit_code == 0 else "Failed"
        if ending.is_disrupted:
            status["conditions"] = [{"type": "DisruptionTarget", "status": "True"}]
        uid = pod["metadata"]["ownerReferences"][0]["uid"]
        job = next((item for item in self.objects.values() if item["metadata"]["uid"] == uid), None)
        if job is not None:
            self._unsettled.append((job, ending))

    def _settle_jobs(self) -> bool:
        """Let Jobs take note of how their pods ended; return whether there was one to do so."""
        if self.are_jobs_late:
            return False
        moved = bool(self._unsettled)
        for job, ending in self._unsettled:
            if job["status"].get("conditions") and ending.exit_code == 0:
                # Another of its pods has failed.
                continue
            asked_to_stop = ending.exit_code == TrainerExitCode.INTERRUPTED
            failed = {"type": "Failed", "status": "True", "message": "once"}
            if ending.exit_code == 0:
                job["status"]["conditions"] = [{"type": "Complete", "status": "True"}]
            elif not ending.is_disrupted and not asked_to_stop:
                job["status"]["conditions"] = [failed]
        self._unsettled.clear()
        return moved

    def _stored(self, manifest: Object) -> Object:
        item = copy.deepcopy(manifest)
        number = next(self._numbers)
        item["metadata"] |= {
            "uid": item["metadata"].get("uid", f"uid-{number:08d}-0000"),
            "resourceVersion": str(number),
            "creationTimestamp": self._time(),
        }
        return item

    def _time(self) -> str:
        number = next(self._numbers)
        return f"2026-01-01T{number // 3600:02d}:{number // 60 % 60:02d}:{number % 60:02d}Z"

    def _before_write(self, verb: str, what: str) -> None:
        self.writes.append((verb, what))
        if self.crash_at == len(self.writes) and not self.crash_after:
            raise CrashError

    def _after_write(self) -> None:
        if self.crash_at == len(self.writes) and self.crash_after:
            raise CrashError

    # What follows is the ClusterPort.

    async def read_run(self, key: RunKey) -> Object | None:
        """See `cluster.Cluster`."""
        return copy.deepcopy(self.objects.get(("StagedFineTune", key.name)))

    async def list_jobs(self, key: RunKey) -> list[Object]:
        """See `cluster.Cluster`."""
        return self._labelled("Job", key)

    async def list_pods(self, key: RunKey) -> list[Object]:
        """See `cluster.Cluster`."""
        return self._labelled("Pod", key)

    def _labelled(self, kind: str, key: RunKey) -> list[Object]:
        return [
            item
            for item in self.of_kind(kind)
            if (item["metadata"].get("labels") or {}).get(names.LABEL_RUN) == key.name
        ]

    async def read_config_map(self, namespace: str, name: str) -> Object | None:
        """See `cluster.Cluster`."""
        return copy.deepcopy(self.objects.get(("ConfigMap", name)))

    async def read_claim(self, namespace: str, name: str) -> Object | None:
        """See `cluster.Cluster`."""
        return copy.deepcopy(self.objects.get(("PersistentVolumeClaim", name)))

    async def read_service(self, namespace: str, name: str) -> Object | None:
        """See `cluster.Cluster`."""
        return copy.deepcopy(self.objects.get(("Service", name)))

    async def create(self, manifest: Object) -> Object:
        """See `cluster.Cluster`."""
        key = manifest["kind"], manifest["metadata"]["name"]
        self._before_write("create", "/".join(key))
        if key in self.objects:
            raise AlreadyExistsError(key[1])
        if (why := self.deny(manifest)) is not None:
            raise DeniedError(why)
        self.objects[key] = self._stored(manifest)
        self._after_write()
        return copy.deepcopy(self.objects[key])

    async def delete_job(self, namespace: str, name: str, uid: str) -> None:
        """See `cluster.Cluster`."""
        self._before_write("delete", f"Job/{name}")
        job = self.objects.get(("Job", name))
        if job is not None and job["metadata"]["uid"] == uid and self.keep_deleted:
            job["metadata"]["deletionTimestamp"] = self._time()
        elif job is not None and job["metadata"]["uid"] == uid:
            del self.objects["Job", name]
            for (kind, pod), item in list(self.objects.items()):
                if kind == "Pod" and item["metadata"]["ownerReferences"][0]["uid"] == uid:
                    del self.objects[kind, pod]
        self._after_write()

    async def write_status(self, run: Object, status: Object) -> Object:
        """See `cluster.Cluster`."""
        self._before_write("update", "StagedFineTune/status")
        stored = self.objects.get(("StagedFineTune", run["metadata"]["name"]))
        if stored is None:
            raise GoneError("the run is gone")
        if stored["metadata"]["resourceVersion"] != run["metadata"]["resourceVersion"]:
            raise ConflictError("the run has changed")
        stored["status"] = copy.deepcopy(status)
        stored["metadata"]["resourceVersion"] = str(next(self._numbers))
        self._after_write()
        return copy.deepcopy(stored)

    async def post_event(self, run: Object, type: str, reason: str, message: str) -> None:
        """See `cluster.Cluster`."""
        self._before_write("create", "Event")
        self.events.append((type, str(reason), message))
        self._after_write()

    # And this the StorePort.

    def snapshot(self, key: RunKey) -> "FakeSnapshot":
        """Return what the watches said last."""
        seen = self.stale if self.stale is not None else list(self.objects.values())
        run = next((i for i in seen if i.get("kind") == names.KIND), None)
        labelled = [
            item for item in seen if (item["metadata"].get("labels") or {}).get(names.LABEL_RUN)
        ]
        return FakeSnapshot(
            run=copy.deepcopy(run),
            jobs=[copy.deepcopy(item) for item in labelled if item["kind"] == "Job"],
            pods=[copy.deepcopy(item) for item in labelled if item["kind"] == "Pod"],
        )

    def apply_run(self, event_type: str | None, body: Object) -> None:
        """Nothing is remembered: a snapshot is what is there."""


@dataclass(frozen=True, kw_only=True)
class FakeSnapshot:
    """What the watches said last of a run."""

    run: Object | None
    jobs: Sequence[Object]
    pods: Sequence[Object]
