"""How long a run's GPU waits between two stages, on a real node with both real images.

    python benchmarks/handover.py [--runs 1] [--layers 12] [--output benchmarks/results/...]

As root. A model of tiny layers is tuned in as many stages as it has layers; each hand-over from one
stage to the next is split up. Every time is of this machine's one clock: the trainer's reports have
milliseconds, containerd's log says when a container's process ended, and a watch of our own says
when the API server told of Jobs and pods. The API's own times are whole seconds and not used.
docs/performance.md says what is measured.
"""

import argparse
import asyncio
import json
import os
import platform
import re
import statistics
import tempfile
import threading
import time
from collections.abc import Sequence
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

from kubernetes.aio.config import new_client_from_config

from local_cluster.binaries import BinariesUnavailableError, cache_directory, kubernetes_version
from local_cluster.node import why_no_node
from local_cluster.programs import CONTAINERD
from staged_cluster import NAMESPACE, StagedCluster, staged_cluster
from stagetune_api import names
from stagetune_api.progress import Progress, ProgressKind
from stagetune_api.report import StageReport
from stagetune_operator.connection import open_watch_session
from tiny_workspace import build_workspace

Object = dict[str, Any]

PARTS = {
    "publish": "last step -> report on the volume",
    "exit": "report -> container's process has ended",
    "notice": "process ended -> container's end in the API",
    "release": "container's end -> pod's end (phase) in the API",
    "decide": "pod's end -> next Job in the API",
    "schedule": "Job in the API -> its pod bound to the node",
    "start": "pod bound -> process of its container began, or has its stage file",
    "imports": "interpreter and imports",
    "load": "model, data and chain verified and in place",
    "firstStep": "first validation and first step",
}
"""The parts of a hand-over, in their order. The first two are the old stage's; the sum of the rest
is the hand-over as the operator counts it: from the container's end to the next first step."""
OF_HANDOVER = tuple(PARTS)[2:]
TARGET_SECONDS, STANDBY_TARGET_SECONDS = 10.0, 5.0
STANDBY_EPOCHS = 100
RUN_SECONDS = 3600.0
IDLE_SECONDS = 5.0
CLAIM = "handover-inputs"
_EXIT = re.compile(
    r'received container exit event container_id:\\"(\w+)\\".*'
    r"exited_at:\{seconds:(\d+)(?: nanos:(\d+))?\}"
)


class Timeline:
    """When the API server told of Jobs and pods: a watch in a thread of its own, as a context."""

    def __init__(self, kubeconfig: Path) -> None:
        self.moments: dict[tuple[str, str, str], float] = {}
        """By run, task and what it was, the Unix time at which it was first told."""
        self.containers: dict[tuple[str, str], str] = {}
        """Id of the last container of a run's task."""
        self._kubeconfig = kubeconfig
        self._ready = threading.Barrier(2)
        self._ending: tuple[asyncio.AbstractEventLoop, asyncio.Event] | None = None
        self._thread = threading.Thread(target=lambda: asyncio.run(self._main()), daemon=True)

    def __enter__(self) -> "Timeline":
        self._thread.start()
        self._ready.wait(30)
        return self

    def __exit__(self, *_: object) -> None:
        assert self._ending is not None
        loop, ending = self._ending
        loop.call_soon_threadsafe(ending.set)
        self._thread.join(30)

    async def _main(self) -> None:
        client = await new_client_from_config(config_file=str(self._kubeconfig))
        server, session = open_watch_session(
            client, on_list=_ignore, on_watch=_ignore, on_refusal=_ignore
        )
        ending = asyncio.Event()
        self._ending = asyncio.get_running_loop(), ending
        async with client, session:
            paths = (f"{group}/namespaces/{NAMESPACE}" for group in ("/apis/batch/v1", "/api/v1"))
            watches = [
                asyncio.create_task(self._watch(session, f"{server}{path}/{kind}"))
                for path, kind in zip(paths, ("jobs", "pods"), strict=True)
            ]
            self._ready.wait(30)
            await ending.wait()
            for watch in watches:
                watch.cancel()
            await asyncio.gather(*watches, return_exceptions=True)

    async def _watch(self, session: Any, url: str) -> None:
        # From any version on: what is told a second time is not the first time.
        parameters = {"watch": "true", "resourceVersion": "0", "timeoutSeconds": "3600"}
        while True:
            async with session.get(url, params=parameters, timeout=None) as answer:
                async for line in answer.content:
                    event = json.loads(line)
                    if event["type"] in ("ADDED", "MODIFIED"):
                        self._note(event["object"], time.time())

    def _note(self, item: Object, now: float) -> None:
        labels = item["metadata"].get("labels", {})
        owner = labels.get(names.LABEL_RUN, ""), labels.get(names.LABEL_TASK, "")
        told = set()
        if item["kind"] == "Job":
            told.add("Job")
        elif item["spec"].get("nodeName"):
            told.add("Bound")
            if item["status"].get("phase") in ("Succeeded", "Failed"):
                told.add("Over")
            for container in item["status"].get("containerStatuses", []):
                if "terminated" in container["state"]:
                    told.add("Ended")
                    self.containers[owner] = container["containerID"].removeprefix("containerd://")
        for what in told:
            self.moments.setdefault((*owner, what), now)


def _ignore(path: str) -> None:
    """Take no notice."""


class Stage:
    """What is known of a stage that is done."""

    def __init__(self, folder: Path) -> None:
        self.task = folder.name
        report = folder / names.REPORT_FILE
        self.written = report.stat().st_mtime
        timings = StageReport.model_validate_json(report.read_bytes()).timings
        assert timings is not None
        assert timings.imports_seconds is not None
        assert timings.load_seconds is not None
        assert timings.first_step_time is not None
        self.began = _seconds(timings.start_time)
        self.imports, self.load = timings.imports_seconds, timings.load_seconds
        self.first_step = _seconds(timings.first_step_time)
        lines = (folder / names.METRICS_FILE).read_text().splitlines()
        steps = [Progress.model_validate_json(line) for line in lines]
        self.last_step = max(
            _seconds(line.time) for line in steps if line.kind is ProgressKind.STEP
        )


def _seconds(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()


def exits(log: str) -> dict[str, float]:
    """Return when each container's process ended, from containerd's log, by the container's id."""
    return {
        container: int(seconds) + int(nanoseconds or 0) / 1e9
        for container, seconds, nanoseconds in _EXIT.findall(log)
    }


def split(
    run: str, old: Stage, new: Stage, timeline: Timeline, ended: dict[str, float]
) -> dict[str, float]:
    """Return the parts of the hand-over from one stage to the next, in seconds."""
    exited = ended[timeline.containers[run, old.task]]
    told, over = (timeline.moments[run, old.task, what] for what in ("Ended", "Over"))
    job, bound = (timeline.moments[run, new.task, what] for what in ("Job", "Bound"))
    if bound < over:
        # It stood by: what is left is that it gets its stage file.
        job = bound = over
    loaded = new.began + new.imports + new.load
    parts = {
        "publish": old.written - old.last_step,
        "exit": exited - old.written,
        "notice": told - exited,
        "release": over - told,
        "decide": job - over,
        "schedule": bound - job,
        "start": new.began - bound,
        "imports": new.imports,
        "load": new.load,
        "firstStep": new.first_step - loaded,
    }
    assert tuple(parts) == tuple(PARTS)
    return parts


def manifest(name: str, *, standby: bool) -> Object:
    """Return a run with one stage for each layer, each of eight steps.

    Where pods stand by, of so many that a stage takes longer than a pod needs to get ready.
    """
    # Two pods at once, of which one stands by, and the node has one GPU.
    gpu = {} if standby else {"nvidia.com/gpu": 1}
    resources = {
        "limits": {**gpu, "memory": "4Gi"},
        "requests": {"cpu": "100m", "memory": "1Gi"},
    }
    source = f"pvc://{CLAIM}"
    return {
        "apiVersion": names.API_VERSION,
        "kind": names.KIND,
        "metadata": {"name": name, "namespace": NAMESPACE},
        "spec": {
            "model": {"source": f"{source}/model"},
            "dataset": {
                "source": f"{source}/rows.jsonl",
                "validation": {"fraction": 0.2},
                "maxLength": 64,
            },
            "schedule": {
                "layersPerStage": 1,
                **({"epochsPerStage": STANDBY_EPOCHS} if standby else {}),
            },
            "training": {"learningRate": 1e-3, "batchSize": 4, "microBatchSize": 4},
            "evaluation": {"exactMatch": {"maxRows": 2, "maxNewTokens": 2}},
            "runtime": {"resources": resources, "standby": "Auto" if standby else "Never"},
            "storage": {"size": "10Gi"},
        },
    }


def measure(staged: StagedCluster, num_runs: int, num_layers: int, *, standby: bool) -> Object:
    """Let runs go through, one after the other, and return every hand-over of each."""
    with tempfile.TemporaryDirectory() as scratch:
        staged.put_inputs(CLAIM, build_workspace(Path(scratch), num_layers=num_layers))
    handovers: list[Object] = []
    with Timeline(staged.cluster.kubeconfig) as timeline:
        for number in range(num_runs):
            run = f"handover-{number + 1}"
            staged.apply(manifest(run, standby=standby))
            status = staged.await_status(
                run,
                lambda status: status.get("state") == "Succeeded",
                what="end",
                seconds=RUN_SECONDS,
                on_change=lambda status: _tell(
                    f"{status.get('state')} {status.get('stage', '')} {status.get('progress', '')}"
                ),
            )
            log = (staged.directory / "logs" / "containerd.log").read_text()
            folders = sorted((staged.folder(run) / "stages").iterdir())
            stages = [Stage(folder) for folder in folders]
            for index, (old, new) in enumerate(pairwise(stages), start=1):
                parts = split(run, old, new, timeline, exits(log))
                handovers.append(
                    {
                        "run": run,
                        "to": new.task,
                        "seconds": round(sum(parts[name] for name in OF_HANDOVER), 3),
                        "operatorCounts": status["stages"][index].get("handoffSeconds"),
                        "parts": {name: round(value, 3) for name, value in parts.items()},
                    }
                )
    return {
        "runs": num_runs,
        "stagesOfARun": num_layers,
        "handovers": len(handovers),
        "handoverSeconds": quantiles([item["seconds"] for item in handovers]),
        "parts": {
            name: {"what": what, **quantiles([item["parts"][name] for item in handovers])}
            for name, what in PARTS.items()
        },
        "operatorCounts": quantiles(
            [item["operatorCounts"] for item in handovers if item["operatorCounts"] is not None]
        ),
        "each": handovers,
    }


def quantiles(values: Sequence[float]) -> Object:
    """Return the middle, the 95th of a hundred and the ends."""
    hundredths = statistics.quantiles(values, n=100, method="inclusive")
    return {
        "p50": round(hundredths[49], 3),
        "p95": round(hundredths[94], 3),
        "least": round(min(values), 3),
        "most": round(max(values), 3),
    }


def busy_seconds() -> float:
    """Return how long this machine's processors have worked since it was started, in all."""
    fields = [int(field) for field in Path("/proc/stat").read_text().split("\n")[0].split()[1:9]]
    user, nice, system, _, _, interrupt, soft, _ = fields
    return (user + nice + system + interrupt + soft) / os.sysconf("SC_CLK_TCK")


def other_nodes() -> int:
    """Return how many nodes of others are on this machine."""
    own = f"node-of-{os.getpid()}-"
    folders = cache_directory().glob("node-of-*/processes.json")
    numbers = [path.parent.name.split("-")[2] for path in folders if own not in str(path)]
    return sum(Path(f"/proc/{number}").exists() for number in numbers)


def show(result: Object) -> None:
    """Print the table."""
    print(f"{result['handovers']} hand-overs, seconds{'':37} p50     p95     most")
    rows = {name: {**item, "what": PARTS[name]} for name, item in result["parts"].items()}
    whole = {"what": "process ended -> next first step", **result["handoverSeconds"]}
    counted = {"what": "the same, as the operator counts it", **result["operatorCounts"]}
    for name, row in {**rows, "whole": whole, "": counted}.items():
        numbers = "".join(f"{row[key]:8.2f}" for key in ("p50", "p95", "most"))
        print(f"  {name:10} {row['what']:48}{numbers}")


def _tell(text: str) -> None:
    print(text, flush=True)


def main() -> int:
    """Measure, print a table and write the JSON file; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--standby", action="store_true", help="let the next stage's pod stand by")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--note", default="", help="said of the machine in the result")
    given = parser.parse_args()
    name = "handover-standby" if given.standby else "handover"
    output = given.output or Path(f"benchmarks/results/{name}.json")
    most = STANDBY_TARGET_SECONDS if given.standby else TARGET_SECONDS
    if reason := why_no_node():
        _tell(reason)
        return 1
    begun = time.monotonic()
    try:
        # Programs and images are there afterwards, and what this process does is the cluster's.
        with staged_cluster(_tell, "handover") as staged:
            nodes, load = [other_nodes()], [os.getloadavg()[0]]
            busy, clock = busy_seconds(), time.monotonic()
            time.sleep(IDLE_SECONDS)
            before = (busy_seconds() - busy) / (time.monotonic() - clock)
            busy, clock = busy_seconds(), time.monotonic()
            result = measure(staged, given.runs, given.layers, standby=given.standby)
            during = (busy_seconds() - busy) / (time.monotonic() - clock)
            nodes.append(other_nodes())
            load.append(os.getloadavg()[0])
    except BinariesUnavailableError as error:
        _tell(str(error))
        return 1
    p50 = result["handoverSeconds"]["p50"]
    target = {
        "what": "p50 of a hand-over, s",
        "measured": p50,
        "most": most,
        "isMet": p50 <= most,
    }
    machine = {
        "processors": os.cpu_count(),
        "python": platform.python_version(),
        "kubernetes": kubernetes_version(),
        "containerd": CONTAINERD.version,
        "niceness": os.nice(0),
        "load": {"before": round(load[0], 2), "after": round(load[1], 2)},
        "busyProcessors": {"before": round(before, 2), "during": round(during, 2)},
        "otherNodes": {"before": nodes[0], "after": nodes[1]},
        "note": given.note,
    }
    document = {
        "machine": machine,
        "minutes": round((time.monotonic() - begun) / 60, 1),
        "model": f"Llama, {given.layers} layers, hidden size 32, random weights, no GPU",
        "targets": [target],
        **result,
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(document, indent=2) + "\n")
    show(result)
    print(f"p50 {p50:g} s, target {most:g} s: {'met' if target['isMet'] else 'MISSED'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
