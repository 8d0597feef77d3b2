"""One pass over one run: decide from what the watches said, look again before acting, act, write.

Knows neither kopf nor the client. Most passes find nothing to do and cost no call. Before anything
is created, deleted or written, the run and its objects are read anew and decided on again, so a
stale or missing event can delay a run and never make it do something twice.
"""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from stagetune_api.report import FailureClass
from stagetune_api.status import (
    ConditionReason,
    RunState,
    StagedFineTuneStatus,
    StageState,
    utc_now,
)
from stagetune_operator.conditions import Standing, with_standing
from stagetune_operator.decide import Decision, decide
from stagetune_operator.errors import (
    AlreadyExistsError,
    ConflictError,
    DeniedError,
    GoneError,
    UnavailableError,
)
from stagetune_operator.events import events_between
from stagetune_operator.keys import RunKey
from stagetune_operator.ownership import is_of_earlier_run, is_own
from stagetune_operator.plan_record import (
    DamagedPlanError,
    PlanRecord,
    plan_record_name,
    read_plan_record,
)
from stagetune_operator.records import ProgressView, read_status, records_of
from stagetune_operator.run_pass import Circumstances, Create, DeleteJob, Intent
from stagetune_operator.settings import Settings
from stagetune_operator.views import Object, view_run

logger = logging.getLogger(__name__)

_DENIED_SECONDS = 30.0
_LEFTOVER_SECONDS = 5.0
_CONFLICT_SECONDS = 0.5
_VOLATILE = {"step", "loss", "validation_loss", "tokens_per_second", "eta_seconds"}


class ClusterPort(Protocol):
    """The calls to the API server that a pass makes; `cluster.Cluster` is the real one."""

    async def read_run(self, key: RunKey) -> Object | None: ...
    async def list_jobs(self, key: RunKey) -> list[Object]: ...
    async def list_pods(self, key: RunKey) -> list[Object]: ...
    async def read_config_map(self, namespace: str, name: str) -> Object | None: ...
    async def read_claim(self, namespace: str, name: str) -> Object | None: ...
    async def read_service(self, namespace: str, name: str) -> Object | None: ...
    async def create(self, manifest: Object) -> Object: ...
    async def delete_job(self, namespace: str, name: str, uid: str) -> None: ...
    async def write_status(self, run: Object, status: Object) -> Object: ...
    async def post_event(self, run: Object, type: str, reason: str, message: str) -> None: ...


class SnapshotView(Protocol):
    """What the watches last said of one run."""

    @property
    def run(self) -> Object | None: ...
    @property
    def jobs(self) -> Sequence[Object]: ...
    @property
    def pods(self) -> Sequence[Object]: ...


class StorePort(Protocol):
    """Where the watches' words are kept."""

    def snapshot(self, key: RunKey) -> SnapshotView: ...
    def apply_run(self, event_type: str | None, body: Object) -> object: ...


class Observer(Protocol):
    """Who is told what a pass found; the metrics."""

    def observe_stage(self, seconds: float) -> None: ...
    def observe_handoff(self, seconds: float) -> None: ...
    def count_failure(self, failure_class: FailureClass) -> None: ...


@dataclass(kw_only=True)
class _Memory:
    """What is remembered of a run between passes; nothing depends on it but how much is done."""

    uid: str
    plan: PlanRecord | None = None
    first_asked: dict[str, float] = field(default_factory=dict)
    written: float = float("-inf")
    """When the status was last written."""
    declined: set[str] = field(default_factory=set)
    """Optional objects that could not be made, by name."""
    offers: Mapping[str, str] = field(default_factory=dict)
    """Stage files for pods that stand by and whose task is due, by the pod's uid."""
    held: tuple[int, float] = (-1, 0.0)
    """The generation that something was refused for, and until when it is not tried again."""


class _Refused(NamedTuple):
    """What follows from an action that was refused."""

    standing: Standing
    fallback: StagedFineTuneStatus
    look_again_seconds: float


class Reconciler:
    """Brings runs on, one pass at a time; passes over different runs may overlap."""

    def __init__(
        self,
        *,
        cluster: ClusterPort,
        store: StorePort,
        settings: Settings,
        observer: Observer,
        progress_of: Callable[[RunKey], Mapping[str, ProgressView]],
        now: Callable[[], str] = utc_now,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        """`now` dates what changes in a status; `monotonic` measures how long something lasts."""
        self._cluster = cluster
        self._store = store
        self._settings = settings
        self._observer = observer
        self._progress_of = progress_of
        self._now = now
        self._monotonic = monotonic
        self._memories: dict[RunKey, _Memory] = {}

    async def reconcile(self, key: RunKey) -> float | None:
        """Do what the run needs; return in how many seconds to look again, None for no need."""
        seen = self._store.snapshot(key)
        if seen.run is None or "deletionTimestamp" in seen.run["metadata"]:
            self._memories.pop(key, None)
            return None
        decision = await self._decide(key, seen.run, seen.jobs, seen.pods)
        self._memory(key, seen.run).offers = decision.offers
        withheld = self._is_withheld(key, seen.run, decision)
        if withheld is not None:
            return _sooner(withheld, decision.look_again_seconds)
        try:
            return await self._act(key)
        except ConflictError:
            # The run changed under our hands; its event is under way.
            return _CONFLICT_SECONDS
        except GoneError:
            return None

    def stage_file_for(self, key: RunKey, pod_uid: str) -> str | None:
        """Return the stage file of a pod that stands by; None while its task is not due."""
        memory = self._memories.get(key)
        return memory.offers.get(pod_uid) if memory is not None else None

    async def _act(self, key: RunKey) -> float | None:
        """Decide by what is really there, and do it."""
        run = await self._cluster.read_run(key)
        if run is None or "deletionTimestamp" in run["metadata"]:
            return None
        jobs, pods = await self._cluster.list_jobs(key), await self._cluster.list_pods(key)
        decision = await self._decide(key, run, jobs, pods)
        memory = self._memory(key, run)
        refused = await self._perform(run, decision.intents, memory.declined)
        look_again = decision.look_again_seconds
        status = decision.status
        if refused is not None:
            generation = run["metadata"].get("generation", 0)
            status = with_standing(
                refused.fallback, refused.standing, generation=generation, now=self._now()
            )
            look_again = _sooner(look_again, refused.look_again_seconds)
            memory.held = generation, self._monotonic() + refused.look_again_seconds
        if decision.record is not None and decision.record.plan.digest == status.plan_digest:
            memory.plan = decision.record
        before = read_status(run)
        if status != before:
            written = await self._cluster.write_status(run, _as_json(status))
            self._store.apply_run("MODIFIED", written)
            memory.written = self._monotonic()
            self._observe(before, status)
            for event in events_between(before, status):
                await self._cluster.post_event(run, *event)
        return look_again

    async def _decide(
        self, key: RunKey, run: Object, jobs: Sequence[Object], pods: Sequence[Object]
    ) -> Decision:
        asked = self._memory(key, run).first_asked

        def age(what: str) -> float:
            return self._monotonic() - asked.setdefault(what, self._monotonic())

        circumstances = Circumstances(
            settings=self._settings,
            now=self._now(),
            age=age,
            record=await self._plan_of(key, run),
            progress=self._progress_of(key),
            declined=self._memory(key, run).declined,
        )
        return decide(view_run(run, jobs, pods), circumstances)

    def _memory(self, key: RunKey, run: Object) -> _Memory:
        """Return what is remembered of this very run: another one may have had its name."""
        memory, uid = self._memories.get(key), run["metadata"]["uid"]
        if memory is None or memory.uid != uid:
            memory = self._memories[key] = _Memory(uid=uid)
        return memory

    async def _plan_of(self, key: RunKey, run: Object) -> PlanRecord | None:
        """Return the plan that the run follows; read once, since it is immutable."""
        memory = self._memory(key, run)
        status = run.get("status") or {}
        digest = status.get("planDigest")
        retry = (run["spec"].get("retry") or {}).get("number", 0)
        is_inert = "completionTime" in status and retry <= status.get("retryNumber", 0)
        if not digest or is_inert:
            memory.plan = None
            return None
        if memory.plan is not None and memory.plan.plan.digest == digest:
            return memory.plan
        name = plan_record_name(key.name, digest)
        config_map = await self._cluster.read_config_map(key.namespace, name)
        if config_map is None or not is_own(config_map, run):
            return None
        try:
            record = read_plan_record(config_map.get("data") or {})
        except DamagedPlanError as error:
            logger.warning("%s: the plan in %s cannot be read: %s", key, name, error)
            return None
        memory.plan = record if record.plan.digest == digest else None
        return memory.plan

    def _is_withheld(self, key: RunKey, run: Object, decision: Decision) -> float | None:
        """Return in how many seconds `decision` is to be acted on; None: at once.

        Progress alone is written only now and then: every write goes to each watcher. And what was
        refused is not tried with every event: one of them is that the refusal was written down,
        with words that may be others each time.
        """
        memory, before = self._memory(key, run), read_status(run)
        if decision.intents:
            generation, until = memory.held
            left = until - self._monotonic()
            is_held = left > 0 and generation == run["metadata"].get("generation", 0)
            return left if is_held else None
        if decision.status == before:
            return decision.look_again_seconds or float("inf")
        if _skeleton(decision.status) != _skeleton(before):
            return None
        left = self._settings.progress_status_seconds - (self._monotonic() - memory.written)
        return left if left > 0 else None

    async def _perform(
        self, run: Object, intents: Sequence[Intent], declined: set[str]
    ) -> _Refused | None:
        """Do what is intended, in order; return what follows if one action is refused.

        What the run goes on without is put into `declined` instead.
        """
        for intent in intents:
            match intent.action:
                case DeleteJob(name=name, uid=uid):
                    await self._cluster.delete_job(run["metadata"]["namespace"], name, uid)
                case Create(manifest=manifest, is_optional=True):
                    if not await self._try_to_create(run, manifest):
                        declined.add(manifest["metadata"]["name"])
                case Create(manifest=manifest):
                    standing = await self._create(run, manifest)
                    if standing is not None:
                        is_final = standing.reason is ConditionReason.CANNOT_CREATE
                        lasts = is_final or standing.is_stalled
                        seconds = _DENIED_SECONDS if lasts else _LEFTOVER_SECONDS
                        return _Refused(standing, intent.fallback, seconds)
        return None

    async def _try_to_create(self, run: Object, manifest: Object) -> bool:
        """Make an object that the run goes on without; return whether it is there."""
        try:
            return await self._create(run, manifest) is None
        except (UnavailableError, ConflictError) as error:
            logger.info("%s is not made: %s", manifest["metadata"]["name"], error)
            return False

    async def _create(self, run: Object, manifest: Object) -> Standing | None:
        what = f"{manifest['kind']} {manifest['metadata']['name']}"
        try:
            await self._cluster.create(manifest)
        except AlreadyExistsError:
            found = await self._find(run, manifest)
            if found is not None and is_own(found, run):
                # The answer to an earlier call was lost.
                return None
            if found is None and manifest["kind"] != "Job":
                raise ConflictError(f"{what} went away meanwhile") from None
            is_left_over = found is not None and is_of_earlier_run(found, run)
            return _name_conflict(what, is_left_over=is_left_over)
        except DeniedError as error:
            return Standing(
                state=RunState.QUEUED,
                reason=ConditionReason.CANNOT_CREATE,
                message=f"{what} cannot be created: {error}"[:4096],
            )
        return None

    async def _find(self, run: Object, manifest: Object) -> Object | None:
        """Return the object that has the name of `manifest`; of Jobs only one with our labels."""
        namespace, name = run["metadata"]["namespace"], manifest["metadata"]["name"]
        match manifest["kind"]:
            case "Job":
                jobs = await self._cluster.list_jobs(RunKey(namespace, run["metadata"]["name"]))
                return next((job for job in jobs if job["metadata"]["name"] == name), None)
            case "ConfigMap":
                return await self._cluster.read_config_map(namespace, name)
            case "Service":
                return await self._cluster.read_service(namespace, name)
            case _:
                return await self._cluster.read_claim(namespace, name)

    def _observe(self, before: StagedFineTuneStatus, after: StagedFineTuneStatus) -> None:
        done = {item.name for item in before.stages if item.state is StageState.SUCCEEDED}
        for stage in after.stages:
            if stage.state is not StageState.SUCCEEDED or stage.name in done:
                continue
            if stage.measured is not None:
                self._observer.observe_stage(stage.measured.seconds)
            if stage.handoff_seconds is not None:
                self._observer.observe_handoff(stage.handoff_seconds)
        known = {(item.name, item.last_failure) for item in records_of(before)}
        for item in records_of(after):
            if item.last_failure is not None and (item.name, item.last_failure) not in known:
                self._observer.count_failure(item.last_failure.failure_class)


def _name_conflict(what: str, *, is_left_over: bool) -> Standing:
    cure = "remove it, or apply the run under another name"
    message = f"{what} is there already and belongs to somebody else; {cure}"
    if is_left_over:
        message = f"{what} is left of a run that had this name before; it is waited for until gone"
    return Standing(
        state=RunState.QUEUED,
        reason=ConditionReason.NAME_CONFLICT,
        message=message,
        is_stalled=not is_left_over,
    )


def _skeleton(status: StagedFineTuneStatus) -> StagedFineTuneStatus:
    """Return `status` without what changes with every step."""
    blank = dict.fromkeys(_VOLATILE, None) | {"step": 0}
    stages = [
        item if item.state is not StageState.RUNNING else item.model_copy(update=blank)
        for item in status.stages
    ]
    columns = {"progress": "", "loss": "", "eta": ""}
    return status.model_copy(update={"stages": stages, **columns})


def _as_json(status: StagedFineTuneStatus) -> Object:
    return status.model_dump(mode="json", exclude_none=True)


def _sooner(first: float | None, second: float | None) -> float | None:
    times = [item for item in (first, second) if item is not None and item != float("inf")]
    return min(times, default=None)
