"""How much the operator can do, against a real API server, scheduler and Job controller.

    python benchmarks/operator_scale.py [--runs 1000] [--output benchmarks/results/...]
    python benchmarks/operator_scale.py --restarts-only

The second measures the restarts alone, in minutes: one run goes through the operator, the others
are copies of its objects. Without --output it writes no file.

Pods are a stand-in node's (`tests/support/stand_in_kubelet.py`): they report what a trainer would
and compute nothing. Everything shares the machine: the operator, Kubernetes, the stand-in node and
this program. So times are what this machine allows; processor seconds, writes and memory are the
operator's own. docs/performance.md says what is measured.
"""

import argparse
import asyncio
import contextlib
import json
import os
import platform
import shutil
import statistics
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kubernetes.aio.config import new_client_from_config
from prometheus_client.parser import text_string_to_metric_families

from fake_cluster import report_for
from local_cluster.api import Cluster
from local_cluster.binaries import kubernetes_version, provide_binaries
from local_cluster.control_plane import end_control_plane, start_control_plane
from manifest_cases import edited
from operator_process import OperatorProcess, resident_bytes
from pod_programs import Ended, NeverStarts, Program, Runs
from stagetune_api import names
from stagetune_api.schema import CRD_FILE
from stagetune_api.stage import StageConfig, Task
from stagetune_operator.connection import open_watch_session
from stagetune_operator.resources import Collection
from stand_in_kubelet import StandInKubelet

Object = dict[str, Any]
Send = Callable[[str, str, Object], Awaitable[Object]]
"""Sends method, path and body, and returns the object in the answer."""

RESULT = Path("benchmarks/results/operator-scale.json")
NUM_LAYERS = 4
"""Decoder layers of the model that the stand-in's reports tell of."""
CAPACITY = {"cpu": "100000", "memory": "100Ti", "pods": "100000", "nvidia.com/gpu": "100000"}
CLAIM = "shared"
PARALLEL_REQUESTS = 24
RUNS_TO_COUNT_WRITES = 50
STEP_SECONDS = 2.0
"""How long a pod runs where writes are counted, so that no state is passed unseen."""
QUIET_SECONDS = 3.0
"""A restart is over once no pass has begun for so long; that time itself is not counted."""
POLL_SECONDS = 0.1
MOST_SECONDS = 2 * 3600
COPIED_KINDS = (Collection.CONFIG_MAPS, Collection.JOBS, Collection.PODS)
"""What a run owns, owners first."""
NOBODY = "stagetune.example/nobody"
"""Who cares for the Jobs and schedules the pods that are copies: they stay as they were made."""
_SERVERS_OWN = ("uid", "resourceVersion", "creationTimestamp", "generation", "managedFields")
_JOB_CONTROLLERS_OWN = ("controller-uid", "job-name")
MAX_WRITES_PER_STAGE = 8
MAX_RESTART_SECONDS = 10
OWN_METRICS = (
    "stagetune_queue_depth",
    "stagetune_reconcile_seconds_bucket",
    "stagetune_reconcile_seconds_count",
    "stagetune_reconcile_errors_total",
    "stagetune_api_writes_total",
)


class Scrape:
    """What the operator exports, at one moment."""

    def __init__(self, text: str) -> None:
        self.samples = [
            sample for family in text_string_to_metric_families(text) for sample in family.samples
        ]

    def total(self, name: str) -> float:
        """Return the sum of all series of a metric."""
        return sum(sample.value for sample in self.samples if sample.name == name)

    def by(self, name: str, *labels: str) -> dict[str, float]:
        """Return a metric's series by these of their labels."""
        return {
            " ".join(sample.labels[label] for label in labels): sample.value
            for sample in self.samples
            if sample.name == name
        }

    def quantile(self, name: str, share: float) -> float:
        """Return a quantile of a histogram, as PromQL's histogram_quantile estimates it."""
        buckets = [(float(bound), n) for bound, n in self.by(f"{name}_bucket", "le").items()]
        wanted = share * buckets[-1][1]
        below, lower = 0.0, 0.0
        for bound, count in buckets:
            if count >= wanted and count > below:
                reached = bound if bound != float("inf") else lower
                return lower + (reached - lower) * (wanted - below) / (count - below)
            below, lower = count, bound
        return lower


def look(operator: OperatorProcess) -> Scrape:
    """Return the operator's own numbers, at a price that does not grow with the runs."""
    wanted = "&".join(f"name[]={name}" for name in OWN_METRICS)
    url = f"http://127.0.0.1:{operator.metrics_port}/metrics?{wanted}"
    with urllib.request.urlopen(url, timeout=30) as answer:
        return Scrape(answer.read().decode())


@dataclass(frozen=True, kw_only=True)
class Bench:
    """A control plane with the CRD and a node."""

    cluster: Cluster
    directory: Path

    @contextlib.contextmanager
    def operator(self, namespace: str) -> Iterator[OperatorProcess]:
        """Run the operator for one namespace."""
        log = self.directory / f"operator-{namespace}.log"
        process = OperatorProcess(self.cluster.kubeconfig, log, {"NAMESPACES": namespace})
        with process:
            yield process

    def make_namespace(self, name: str) -> str:
        """Make a namespace with a bound claim in it."""
        size, modes = {"storage": "1Gi"}, ["ReadWriteMany"]
        common = {"accessModes": modes, "storageClassName": ""}
        reference = {"namespace": name, "name": CLAIM}
        volume = {"hostPath": {"path": "/nowhere"}, "capacity": size, "claimRef": reference}
        claim = {"resources": {"requests": size}, "volumeName": name}
        documents = [
            {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}},
            {
                "apiVersion": "v1",
                "kind": "PersistentVolume",
                "metadata": {"name": name},
                "spec": {**common, **volume},
            },
            {
                "apiVersion": "v1",
                "kind": "PersistentVolumeClaim",
                "metadata": {"name": CLAIM, "namespace": name},
                "spec": {**common, **claim},
            },
        ]
        listed = {"apiVersion": "v1", "kind": "List", "items": documents}
        self.cluster.kubectl("create", "-f", "-", stdin=json.dumps(listed))
        return name

    def apply_runs(self, namespace: str, number: int, *, stages: int, prefix: str = "run") -> float:
        """Create runs side by side; return how many seconds that took."""
        path = f"/apis/{names.API_VERSION}/namespaces/{namespace}/{names.PLURAL}"
        bodies = [
            edited(
                {
                    "metadata.name": f"{prefix}-{index:04d}",
                    "metadata.namespace": namespace,
                    "metadata.uid": None,
                    "spec.dataset.source": f"pvc://{CLAIM}/finance.jsonl",
                    "spec.schedule": {"layersPerStage": NUM_LAYERS // stages},
                    "spec.runtime": {"resources": {"limits": {"nvidia.com/gpu": 1}}},
                    "spec.storage": {"claimName": CLAIM},
                }
            )
            for index in range(number)
        ]
        begun = time.monotonic()
        asyncio.run(self._each(bodies, lambda send, body: send("POST", path, body)))
        return time.monotonic() - begun

    def copy_run(self, namespace: str, name: str, number: int) -> None:
        """Put copies of a run, with all that it owns and every status, beside it."""
        of_run = f"{names.LABEL_RUN}={name}"
        owned = [
            (where, self._get(namespace, where.plural, "-l", of_run)["items"])
            for where in COPIED_KINDS
        ]
        run = self._get(namespace, names.PLURAL, name)

        async def copy_it(send: Send, index: int) -> None:
            # Names and uids are in labels, annotations, stage files and reports too.
            renamed = {name: f"copy-{index:04d}"}
            made = await _copy(send, Collection.RUNS, run, renamed)
            old, new = run["metadata"]["uid"], made["metadata"]["uid"]
            renamed |= {old: new, old[:8]: new[:8]}
            for where, items in owned:
                for item in items:
                    made = await _copy(send, where, item, renamed)
                    renamed[item["metadata"]["uid"]] = made["metadata"]["uid"]

        asyncio.run(self._each(range(number), copy_it))

    def _get(self, namespace: str, *what: str) -> Object:
        found: Object = json.loads(
            self.cluster.kubectl("-n", namespace, "get", *what, "-o", "json")
        )
        return found

    async def _each(
        self, items: Iterable[Any], do: Callable[[Send, Any], Awaitable[object]]
    ) -> None:
        """Do something with each, side by side."""
        turn = asyncio.Semaphore(PARALLEL_REQUESTS)
        client = await new_client_from_config(config_file=str(self.cluster.kubeconfig))
        server, session = open_watch_session(
            client, on_list=_ignore, on_watch=_ignore, on_refusal=_ignore
        )

        async def send(method: str, path: str, body: Object) -> Object:
            async with session.request(method, server + path, json=body) as answer:
                if answer.status not in (200, 201):
                    raise RuntimeError(f"{path}: {answer.status} {await answer.text()}")
                made: Object = await answer.json()
                return made

        async def in_turn(item: Any) -> None:
            async with turn:
                await do(send, item)

        async with client, session, asyncio.TaskGroup() as group:
            for item in items:
                group.create_task(in_turn(item))

    def states(self, namespace: str) -> Counter[str]:
        """Return the runs' states, as `kubectl get` shows them."""
        # The server makes the table: of a thousand runs themselves it would send ten megabytes.
        told = self.cluster.kubectl("-n", namespace, "get", names.PLURAL, "--no-headers")
        return Counter(line.split()[1] for line in told.splitlines())

    def versions(self, namespace: str) -> set[str]:
        """Return uid and resourceVersion of every run, Job and ConfigMap."""
        columns = "custom-columns=U:.metadata.uid,V:.metadata.resourceVersion"
        told = self.cluster.kubectl(
            *("-n", namespace, "get", f"{names.PLURAL},jobs,configmaps"),
            *("-o", columns, "--no-headers"),
        )
        return set(told.splitlines())


async def _copy(send: Send, where: Collection, item: Object, renamed: Mapping[str, str]) -> Object:
    """Make a copy of an object, with its status, and return it."""
    text = json.dumps(item)
    # The longest first: the uid's first characters are a name too.
    for old in sorted(renamed, key=len, reverse=True):
        text = text.replace(old, renamed[old])
    body = json.loads(text)
    for key in (*_SERVERS_OWN, "finalizers", "generateName"):
        body["metadata"].pop(key, None)
    if where is Collection.JOBS:
        body["spec"] |= {"managedBy": NOBODY}
        del body["spec"]["selector"]
        labels = body["spec"]["template"]["metadata"]["labels"]
        for key in _JOB_CONTROLLERS_OWN:
            labels.pop(key, None)
            labels.pop(f"batch.kubernetes.io/{key}", None)
    if where is Collection.PODS:
        body["spec"] |= {"schedulerName": NOBODY}
        del body["spec"]["nodeName"]
    path = where.path(body["metadata"]["namespace"])
    made = await send("POST", path, body)
    if "status" not in body:
        return made
    path = where.path(body["metadata"]["namespace"], body["metadata"]["name"])
    return await send("PUT", f"{path}/status", {**made, "status": body["status"]})


def _ignore(path: str) -> None:
    """Take no notice."""


def play(pod: Object) -> Program | NeverStarts:
    """Say what a pod does, by its namespace: end at once, in a moment, or not at all."""
    config = StageConfig.model_validate_json(
        pod["metadata"]["annotations"][names.ANNOTATION_STAGE_CONFIG]
    )
    ended = Ended(message=report_for(config).termination_message())
    namespace = pod["metadata"]["namespace"]
    if namespace == "running" and config.task is Task.TRAIN:
        return Runs(seconds=7 * 86400, then=ended)
    return Runs(seconds=STEP_SECONDS if namespace.startswith("writes") else 0.0, then=ended)


def count_writes(bench: Bench, number: int) -> Object:
    """Return the writes of a run, and of a stage: the difference of runs with two and four."""
    counted: dict[int, dict[str, float]] = {}
    for stages in (2, 4):
        namespace = bench.make_namespace(f"writes-{stages}")
        with bench.operator(namespace) as operator:
            bench.apply_runs(namespace, number, stages=stages)
            await_state(bench, operator, namespace, number, "Succeeded")
            counted[stages] = look(operator).by("stagetune_api_writes_total", "verb", "kind")
    kinds = sorted(set(counted[2]) | set(counted[4]))
    by_kind = {
        kind: {
            "runOfTwoStages": round(counted[2].get(kind, 0) / number, 2),
            "stage": round((counted[4].get(kind, 0) - counted[2].get(kind, 0)) / 2 / number, 2),
        }
        for kind in kinds
    }
    return {
        "runs": number,
        "secondsOfATask": STEP_SECONDS,
        "perRunOfTwoStages": round(sum(counted[2].values()) / number, 2),
        "perRunOfFourStages": round(sum(counted[4].values()) / number, 2),
        "perStage": round((sum(counted[4].values()) - sum(counted[2].values())) / 2 / number, 2),
        "byKind": by_kind,
    }


def run_through(bench: Bench, operator: OperatorProcess, namespace: str, number: int) -> Object:
    """Apply runs of two stages, whose pods end at once, and return how they went through."""
    before, cpu_before = look(operator), cpu_seconds(operator)
    begun = time.monotonic()
    creating = bench.apply_runs(namespace, number, stages=2)
    await_state(bench, operator, namespace, number, "Succeeded")
    seconds = time.monotonic() - begun
    after = look(operator)

    def gained(name: str) -> float:
        return after.total(name) - before.total(name)

    passes = gained("stagetune_reconcile_seconds_count")
    cpu = cpu_seconds(operator) - cpu_before
    return {
        "runs": number,
        "secondsToCreate": round(creating, 1),
        "seconds": round(seconds, 1),
        "runsPerMinute": round(60 * number / seconds, 1),
        "reconciles": int(passes),
        "reconcilesPerSecond": round(passes / seconds, 1),
        "reconcileErrors": int(gained("stagetune_reconcile_errors_total")),
        "reconcileSeconds": {
            "p50": round(after.quantile("stagetune_reconcile_seconds", 0.5), 4),
            "p95": round(after.quantile("stagetune_reconcile_seconds", 0.95), 4),
        },
        "operatorCpuSeconds": round(cpu, 1),
        "operatorCpuSecondsPerRun": round(cpu / number, 4),
        "writesPerRun": round(gained("stagetune_api_writes_total") / number, 2),
        **memory_of(operator),
        "scrape": time_scrape(operator),
    }


def await_state(
    bench: Bench, operator: OperatorProcess, namespace: str, number: int, state: str
) -> None:
    """Return once all runs are in `state` and the operator has nothing left to do."""
    deadline = time.monotonic() + MOST_SECONDS
    while (states := bench.states(namespace))[state] < number:
        if time.monotonic() > deadline:
            raise TimeoutError(f"{namespace}: {dict(states)} after {MOST_SECONDS} s")
        time.sleep(1 + number / 500)
    while look(operator).total("stagetune_queue_depth"):
        if time.monotonic() > deadline:
            raise TimeoutError(f"{namespace}: the queue does not empty")
        time.sleep(0.2)


def restart(bench: Bench, operator: OperatorProcess, namespace: str, number: int) -> Object:
    """Kill the operator, start it, and return how it settled."""
    versions = bench.versions(namespace)
    operator.kill()
    begun = time.monotonic()
    operator.start(wait=False)
    serving = reached(lambda: bool(look(operator).samples)) - begun
    passes, settled = 0.0, time.monotonic()
    while passes < number or time.monotonic() - settled < QUIET_SECONDS:
        seen = look(operator)
        counted = seen.total("stagetune_reconcile_seconds_count")
        if counted != passes or seen.total("stagetune_queue_depth"):
            passes, settled = counted, time.monotonic()
        if time.monotonic() - begun > MOST_SECONDS:
            raise TimeoutError(f"{namespace}: {passes:.0f} passes over {number} runs, not settled")
        time.sleep(POLL_SECONDS)
    known = operator.metric("stagetune_runs")
    if known != number:
        raise RuntimeError(f"{namespace}: the operator knows of {known:.0f} runs of {number}")
    scrape = look(operator)
    return {
        "secondsToServe": round(serving, 2),
        "seconds": round(settled - begun, 2),
        "reconciles": int(passes),
        "reconcileSecondsP95": round(scrape.quantile("stagetune_reconcile_seconds", 0.95), 4),
        "operatorCpuSeconds": round(cpu_seconds(operator), 2),
        "writes": int(scrape.total("stagetune_api_writes_total")),
        "objectsChanged": len(versions ^ bench.versions(namespace)),
        **memory_of(operator),
    }


def reached(holds: Callable[[], bool]) -> float:
    """Return the time at which `holds()`; a server that does not serve yet is waited for."""
    deadline = time.monotonic() + MOST_SECONDS
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            if holds():
                return time.monotonic()
        time.sleep(0.1)
    raise TimeoutError("the operator does not serve")


def cpu_seconds(operator: OperatorProcess) -> float:
    """Return the processor time that the operator has had; proc_pid_stat(5), fields 14 and 15."""
    line = Path(f"/proc/{operator.number}/stat").read_text()
    user, system = line.rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def memory_of(operator: OperatorProcess) -> Object:
    """Return the operator's memory now, and the most that it had."""
    status = Path(f"/proc/{operator.number}/status").read_text()
    most = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
    return {
        "residentMiB": round(resident_bytes(operator.number) / 2**20, 1),
        "mostResidentMiB": round(int(most.split()[1]) / 2**10, 1),
    }


def time_scrape(operator: OperatorProcess) -> Object:
    """Return what one scrape of the operator's metrics takes."""
    seconds, size = [], 0
    for _ in range(3):
        begun = time.monotonic()
        size = len(operator.metrics())
        seconds.append(time.monotonic() - begun)
    return {"seconds": round(statistics.median(seconds), 3), "bytes": size}


def summarized(restarts: Sequence[Mapping[str, float]]) -> Object:
    """Return median, least and most of each number over the restarts."""
    return {
        "restarts": len(restarts),
        **{
            name: {
                "median": round(statistics.median(item[name] for item in restarts), 3),
                "least": min(item[name] for item in restarts),
                "most": max(item[name] for item in restarts),
            }
            for name in restarts[0]
        },
    }


@contextlib.contextmanager
def standing_bench() -> Iterator[Bench]:
    """Start a control plane with the CRD and a node, and end all of it."""
    directory = Path(tempfile.mkdtemp(prefix="stagetune-bench-"))
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, directory, ignore_errors=True)
        binaries = provide_binaries(print)
        stack.callback(end_control_plane, directory / "control-plane")
        kubeconfig = start_control_plane(binaries, directory / "control-plane")
        cluster = stack.enter_context(Cluster(kubeconfig, binaries / "kubectl", directory))
        cluster.kubectl("apply", "--server-side", "-f", str(CRD_FILE))
        crd = f"crd/{names.PLURAL}.{names.GROUP}"
        cluster.kubectl("wait", "--for=condition=Established", "--timeout=60s", crd)
        stack.enter_context(StandInKubelet(kubeconfig, play, capacity=CAPACITY))
        yield Bench(cluster=cluster, directory=directory)


def measure_restarts(bench: Bench, result: Object, number: int, restarts: int) -> None:
    """Measure the restarts alone, with copies of one run that is over and of one at work."""
    for kind, state in (("finished", "Succeeded"), ("running", "Training")):
        namespace = bench.make_namespace(kind)
        with bench.operator(namespace) as operator:
            bench.apply_runs(namespace, 1, stages=2)
            await_state(bench, operator, namespace, 1, state)
            # It would prepare each copy whose Jobs are not there yet.
            operator.kill()
            bench.copy_run(namespace, "run-0000", number - 1)
            operator.start()
            await_state(bench, operator, namespace, number, state)
            taken = [restart(bench, operator, namespace, number) for _ in range(restarts)]
            section = {"runs": number, "copied": number - 1, **summarized(taken)}
            result[f"restartWith{kind.capitalize()}Runs"] = section
            show(f"restart, all {kind}", section)


def measure(bench: Bench, result: Object, number: int, restarts: int) -> None:
    """Take all measurements, one after the other, into `result`."""
    result["writes"] = count_writes(bench, min(number, RUNS_TO_COUNT_WRITES))
    show("writes", result["writes"])
    namespace = bench.make_namespace("finished")
    with bench.operator(namespace) as operator:
        result["throughput"] = run_through(bench, operator, namespace, number)
        show("throughput", result["throughput"])
        taken = [restart(bench, operator, namespace, number) for _ in range(restarts)]
        result["restartWithFinishedRuns"] = {"runs": number, **summarized(taken)}
        show("restart, all finished", result["restartWithFinishedRuns"])
    namespace = bench.make_namespace("running")
    with bench.operator(namespace) as operator:
        bench.apply_runs(namespace, number, stages=2)
        await_state(bench, operator, namespace, number, "Training")
        result["running"] = {"runs": number, **memory_of(operator), "scrape": time_scrape(operator)}
        taken = [restart(bench, operator, namespace, number) for _ in range(restarts)]
        result["restartWithRunningRuns"] = {"runs": number, **summarized(taken)}
        show("restart, all running", result["restartWithRunningRuns"])


def against_targets(result: Object) -> list[Object]:
    """Return each target with what was measured."""
    finished, running = result["restartWithFinishedRuns"], result["restartWithRunningRuns"]
    rows: list[tuple[str, float, float]] = [
        ("restart, finished runs, s", finished["seconds"]["median"], MAX_RESTART_SECONDS),
        ("restart, running runs, s", running["seconds"]["median"], MAX_RESTART_SECONDS),
        *(
            (f"{what} of a restart, {kind} runs", item[field]["most"], 0)
            for kind, item in (("finished", finished), ("running", running))
            for what, field in (("writes", "writes"), ("objects changed", "objectsChanged"))
        ),
    ]
    if "writes" in result:
        rows = [("writes per stage", result["writes"]["perStage"], MAX_WRITES_PER_STAGE), *rows]
    return [
        {"what": what, "measured": measured, "most": most, "isMet": measured <= most}
        for what, measured, most in rows
    ]


def show(title: str, values: Mapping[str, Any], indent: int = 0) -> None:
    """Print a section of the table."""
    print(f"{'  ' * indent}{title}")
    for name, value in values.items():
        if isinstance(value, Mapping) and "median" in value:
            spread = f"{value['least']:g} to {value['most']:g}"
            print(f"{'  ' * indent}  {name:28} {value['median']:>10g}  ({spread})")
        elif isinstance(value, Mapping):
            show(name, value, indent + 1)
        else:
            print(f"{'  ' * indent}  {name:28} {value:>10g}", flush=True)


def main() -> None:
    """Measure, print a table and write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--restarts", type=int, default=3)
    parser.add_argument("--restarts-only", action="store_true", help="of runs that are copies")
    parser.add_argument("--output", type=Path, help=f"{RESULT} where everything is measured")
    parser.add_argument("--note", default="", help="said of the machine in the result")
    given = parser.parse_args()
    output = given.output if given.restarts_only else given.output or RESULT
    before, begun = os.getloadavg(), time.monotonic()
    result: Object = {}
    targets: list[Object] = []
    try:
        with standing_bench() as bench:
            chosen = measure_restarts if given.restarts_only else measure
            chosen(bench, result, given.runs, given.restarts)
        targets = against_targets(result)
    finally:
        # What was measured before something went wrong took an hour, and is told.
        machine = {
            "processors": os.cpu_count(),
            "python": platform.python_version(),
            "kubernetes": kubernetes_version(),
            "niceness": os.nice(0),
            "loadBefore": [round(item, 2) for item in before],
            "loadAfter": [round(item, 2) for item in os.getloadavg()],
            "note": given.note,
        }
        minutes = round((time.monotonic() - begun) / 60, 1)
        document = {"machine": machine, "minutes": minutes, "targets": targets, **result}
        if output is not None:
            output.parent.mkdir(parents=True, exist_ok=True)
            output.write_text(json.dumps(document, indent=2) + "\n")
    for row in targets:
        met = "met" if row["isMet"] else "MISSED"
        print(f"{row['what']:38} {row['measured']:>8g}  at most {row['most']:g}: {met}")


if __name__ == "__main__":
    main()
