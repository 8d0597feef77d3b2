"""What a run tells while it works: its pods to the operator, and both to a real Prometheus.

The pods of the run `real` are trainer processes on a tiny model, with their pod's environment and a
token that the API server bound to the pod; those of the other runs end by script. Nothing but the
node itself is a stand-in.
"""

import asyncio
import http.client
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import pytest

from fake_cluster import report_for
from local_cluster.api import Cluster
from local_cluster.binaries import BinariesUnavailableError
from local_cluster.control_plane import free_ports
from local_cluster.processes import Process, end_process, start_process, wait_until
from local_cluster.programs import provide_prometheus
from local_cluster.testing import make_tell
from local_cluster.volumes import CLASS, make_volume
from manifest_cases import edited
from operator_process import OperatorProcess
from pod_programs import Ended, NeverStarts, Program, Runs
from stagetune_api import names
from stagetune_api.names import TrainerExitCode
from stagetune_api.progress import Progress
from stagetune_api.stage import StageConfig
from stand_in_kubelet import StandInKubelet
from tiny_workspace import build_workspace

pytestmark = pytest.mark.control_plane

Object = dict[str, Any]
SECONDS = 60
TRAINER_SECONDS = 180
"""Trainer processes import torch, on a machine that may have other work."""
CLAIM = "shared"
ROWS = 1000
STAGE, TASK = "layers-0-1", "01-layers-0-1"
STOPPED = Ended(exit_code=int(TrainerExitCode.INTERRUPTED))

HUGGING_FACE_TRAINING = """
import sys
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
from transformers.integrations import KubeflowCallback

# Two steps take less than the seconds that the callback leaves between its posts.
KubeflowCallback._MIN_UPDATE_INTERVAL = 0.0
sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
model = LlamaForCausalLM(LlamaConfig(vocab_size=16, num_attention_heads=1, **sizes))
rows = [{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}] * 4
arguments = TrainingArguments(
    sys.argv[1], max_steps=2, logging_steps=1, per_device_train_batch_size=2, use_cpu=True,
    save_strategy="no", disable_tqdm=True, report_to=["kubeflow"],
)
trainer = Trainer(model, arguments, train_dataset=rows)
trainer.train()
print([line["loss"] for line in trainer.state.log_history if "loss" in line][-1])
"""


@dataclass(frozen=True, kw_only=True)
class TrainerProcess:
    """A pod's container as a real trainer process, which finds the volumes below `root`."""

    world: "World"
    root: Path
    metrics_port: int

    async def __call__(self, pod: Object, stop: asyncio.Event) -> Ended:
        """Run the pod's task to its end, or until the pod is asked to leave."""
        folder = self.root / "pods" / pod["metadata"]["name"]
        folder.mkdir(parents=True)
        stage, message = folder / "stage.json", folder / "message"
        config = pod["metadata"]["annotations"][names.ANNOTATION_STAGE_CONFIG]
        # Volumes are mounted at /stagetune and /stagetune-claims in a pod.
        stage.write_text(config.replace('"/stagetune', f'"{self.root}/stagetune'))
        token = await asyncio.to_thread(self.world.token, pod)
        arguments = [str(stage), f"--termination-message={message}", "--stop-with-parent"]
        with (folder / "log").open("wb") as log:
            process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "stagetune_trainer", *arguments),
                    f"--metrics-port={self.metrics_port}",
                ],
                env=pod_environment(pod, token, folder),
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
            )
            assert process.stdin is not None
            try:
                while process.poll() is None:
                    if stop.is_set():
                        process.terminate()
                    await asyncio.sleep(0.1)
            finally:
                process.kill()
                process.wait()
                process.stdin.close()
        said = message.read_text() if message.exists() else (folder / "log").read_text()[-2000:]
        return Ended(
            exit_code=process.returncode,
            message=said.replace(f'"{self.root}/stagetune', '"/stagetune'),
        )


def pod_environment(pod: Object, token: str, folder: Path) -> dict[str, str]:
    """Return the environment of the pod's container, with the token in a file of `folder`."""
    (container,) = pod["spec"]["containers"]
    given = {item["name"]: item["value"] for item in container["env"]}
    assert given[names.PROGRESS_TOKEN_VARIABLE] == f"{names.PROGRESS_TOKEN_MOUNT}/token"
    (folder / "token").write_text(token)
    mounted = {names.PROGRESS_TOKEN_VARIABLE: str(folder / "token"), "NO_PROXY": "127.0.0.1"}
    return {**os.environ, **given, **mounted}


class World:
    """A namespace with runs, and a node for their pods."""

    def __init__(self, cluster: Cluster, namespace: str, root: Path) -> None:
        self.cluster = cluster
        self.namespace = namespace
        self.trainer = TrainerProcess(world=self, root=root, metrics_port=free_ports(1)[0])
        self._runs = f"/apis/{names.API_VERSION}/namespaces/{namespace}/{names.PLURAL}"

    def script(self, pod: Object) -> Program | NeverStarts:
        """Return what a pod does."""
        labels = pod["metadata"]["labels"]
        config = StageConfig.model_validate_json(
            pod["metadata"]["annotations"][names.ANNOTATION_STAGE_CONFIG]
        )
        match labels[names.LABEL_RUN], labels[names.LABEL_TASK]:
            case "real", _:
                return self.trainer
            case "failed", task if task == TASK:
                return Runs(then=Ended(exit_code=int(TrainerExitCode.USER_ERROR)))
            case "held", task if task == TASK:
                return Runs(seconds=3600, on_stop=STOPPED)
            case _:
                return Runs(then=Ended(message=report_for(config).termination_message()))

    def apply(self, name: str, **edits: Any) -> None:
        """Apply a run of two stages."""
        manifest = edited(
            {
                "metadata.name": name,
                "metadata.namespace": self.namespace,
                "metadata.uid": None,
                "spec.model.source": f"pvc://{CLAIM}/model",
                "spec.dataset.source": f"pvc://{CLAIM}/rows.jsonl",
                "spec.dataset.validation.fraction": 0.05,
                "spec.dataset.maxLength": 64,
                "spec.schedule": {"layersPerStage": 2, **edits},
                "spec.runtime": {"resources": {"limits": {"nvidia.com/gpu": 1}}},
                "spec.storage": {"claimName": CLAIM},
            }
        )
        self.cluster.kubectl("apply", "-f", "-", stdin=json.dumps(manifest))

    def patch(self, name: str, spec: Object) -> None:
        """Change fields of a run's spec."""
        kind = "application/merge-patch+json"
        answer = self.cluster.request("PATCH", f"{self._runs}/{name}", {"spec": spec}, kind)
        assert answer.status == HTTPStatus.OK, answer.message

    def run(self, name: str) -> Object:
        """Return the run as it is."""
        answer = self.cluster.request("GET", f"{self._runs}/{name}")
        assert answer.status == HTTPStatus.OK, answer.message
        body: Object = answer.body
        return body

    def stage(self, name: str) -> Object:
        """Return the status of the run's first stage; empty before there is a plan."""
        stages = self.run(name).get("status", {}).get("stages")
        return stages[0] if stages else {}

    def until_state(self, name: str, state: str) -> None:
        """Return once the run is in `state`."""
        wait_until(
            lambda: self.run(name).get("status", {}).get("state") == state,
            what=f"{state} of {name}",
            seconds=SECONDS,
        )

    def pod(self, name: str) -> Object:
        """Return the pod of the run's first stage."""
        selector = quote(f"{names.LABEL_RUN}={name},{names.LABEL_TASK}={TASK}")
        path = f"/api/v1/namespaces/{self.namespace}/pods?labelSelector={selector}"
        (pod,) = self.cluster.request("GET", path).body["items"]
        found: Object = pod
        return found

    def token(self, pod: Object | None, audience: str = names.PROGRESS_AUDIENCE) -> str:
        """Return a token of the pods' account, bound to `pod` as the kubelet asks for one."""
        spec: Object = {"audiences": [audience], "expirationSeconds": 3600}
        if pod is not None:
            identity = {key: pod["metadata"][key] for key in ("name", "uid")}
            spec["boundObjectRef"] = {"apiVersion": "v1", "kind": "Pod", **identity}
        path = f"/api/v1/namespaces/{self.namespace}/serviceaccounts/default/token"
        body = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": spec}
        answer = self.cluster.request("POST", path, body)
        assert answer.status == HTTPStatus.CREATED, answer.message
        token: str = answer.body["status"]["token"]
        return token


@pytest.fixture(scope="module")
def world(cluster: Cluster, crd: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    made = cluster.request(
        "POST", "/api/v1/namespaces", {"metadata": {"generateName": "stagetune-told-"}}
    )
    assert made.status == HTTPStatus.CREATED, made.message
    namespace: str = made.body["metadata"]["name"]
    root = tmp_path_factory.mktemp("told")
    # What the pods' processes see of the claim; no kubelet mounts the cluster's own volume.
    inputs = root / "stagetune-claims" / CLAIM
    inputs.mkdir(parents=True)
    build_workspace(inputs)
    # Enough for a stage that does not end by itself while it is looked at.
    rows = [{"query": f"What goes with {n}?", "response": str(n + 1)} for n in range(ROWS)]
    (inputs / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    make_volume(cluster, root, f"{namespace}-{CLAIM}", claim=f"{namespace}/{CLAIM}")
    try:
        spec = {
            "storageClassName": CLASS,
            "accessModes": ["ReadWriteMany"],
            "resources": {"requests": {"storage": "1Gi"}},
        }
        claim = {"metadata": {"name": CLAIM}, "spec": spec}
        path = f"/api/v1/namespaces/{namespace}/persistentvolumeclaims"
        answer = cluster.request("POST", path, claim)
        assert answer.status == HTTPStatus.CREATED, answer.message
        world = World(cluster, namespace, root)
        with StandInKubelet(cluster.kubeconfig, world.script, node="told-node"):
            yield world
    finally:
        cluster.request("DELETE", f"/api/v1/namespaces/{namespace}")
        cluster.request("DELETE", f"/api/v1/persistentvolumes/{namespace}-{CLAIM}")


@pytest.fixture(scope="module")
def operator(world: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[OperatorProcess]:
    (port,) = free_ports(1)
    settings = {
        "NAMESPACES": world.namespace,
        "PORT_PROGRESS": str(port),
        "PROGRESS_URL": f"http://127.0.0.1:{port}",
        "PROGRESS_STATUS_SECONDS": "0.1",
    }
    log = tmp_path_factory.mktemp("operator") / "log.txt"
    with OperatorProcess(world.cluster.kubeconfig, log, settings) as process:
        yield process
    text = log.read_text()
    assert "Traceback" not in text, text[-4000:]


@pytest.fixture(scope="module")
def runs(world: World, operator: OperatorProcess) -> None:
    """A run that succeeded, one that failed, one held by script, and one that really trains."""
    world.apply("real", epochsPerStage=1000)
    for name in ("succeeded", "failed", "held"):
        world.apply(name)
    world.until_state("succeeded", "Succeeded")
    world.until_state("failed", "Failed")
    world.until_state("held", "Training")

    def has_posted() -> bool:
        assert world.run("real").get("status", {}).get("state") != "Failed", world.run("real")
        return bool(world.stage("real").get("step"))

    wait_until(has_posted, what="word of the trainer", seconds=TRAINER_SECONDS)


@pytest.fixture(scope="module")
def programs(request: pytest.FixtureRequest) -> Path:
    """The folder with prometheus and promtool; the first time that takes minutes."""
    try:
        return provide_prometheus(make_tell(request.config))
    except BinariesUnavailableError as error:
        pytest.skip(str(error))


class Prometheus:
    """A real Prometheus that scrapes the operator and the trainer of the run `real`."""

    def __init__(self, program: Path, directory: Path, targets: dict[str, int]) -> None:
        self.port = free_ports(1)[0]
        config = {
            "global": {"scrape_interval": "1s", "scrape_timeout": "1s"},
            "scrape_configs": [
                {"job_name": job, "static_configs": [{"targets": [f"127.0.0.1:{port}"]}]}
                for job, port in targets.items()
            ],
        }
        # YAML 1.2 is a superset of JSON.
        (directory / "prometheus.yml").write_text(json.dumps(config))
        command = [
            str(program),
            f"--config.file={directory / 'prometheus.yml'}",
            f"--storage.tsdb.path={directory / 'data'}",
            f"--web.listen-address=127.0.0.1:{self.port}",
        ]
        log = directory / "log.txt"
        self.process: Process = start_process("prometheus", command, log, ends_with_parent=True)

    def query(self, expression: str) -> list[tuple[dict[str, str], float]]:
        """Return the series of an instant query, each with its labels and its value."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        try:
            connection.request("GET", f"/api/v1/query?query={quote(expression)}")
            response = connection.getresponse()
            if response.status == HTTPStatus.SERVICE_UNAVAILABLE:
                return []
            answer = json.loads(response.read())
        except ConnectionRefusedError:
            return []
        finally:
            connection.close()
        assert answer["status"] == "success", answer
        return [(item["metric"], float(item["value"][1])) for item in answer["data"]["result"]]

    def await_query(self, expression: str) -> list[tuple[dict[str, str], float]]:
        """Return what a query finds as soon as that is anything."""
        wait_until(
            lambda: bool(self.query(expression)),
            what=expression,
            seconds=SECONDS,
            processes=[self.process],
        )
        return self.query(expression)


@pytest.fixture(scope="module")
def prometheus(
    world: World,
    operator: OperatorProcess,
    runs: None,
    programs: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Prometheus]:
    targets = {"operator": operator.metrics_port, "trainer": world.trainer.metrics_port}
    prometheus = Prometheus(programs / "prometheus", tmp_path_factory.mktemp("prometheus"), targets)
    try:
        yield prometheus
    finally:
        end_process(prometheus.process, patience_seconds=20)


def test_status_shows_what_the_trainers_process_posts(
    world: World, operator: OperatorProcess, runs: None
) -> None:
    stage = world.stage("real")
    assert 0 < stage["step"] < stage["totalSteps"]
    assert stage["loss"] > 0
    assert stage["tokensPerSecond"] > 0
    assert operator.metric('stagetune_progress_posts_total{result="200"}') >= 1
    wait_until(
        lambda: world.stage("real")["step"] > stage["step"],
        what="progress in the status",
        seconds=SECONDS,
    )


def post(pod: Object, token: str | None, task: str = TASK, *, step: int = 77) -> int:
    """Post for a task of the pod's run, and return the answer's HTTP status."""
    (container,) = pod["spec"]["containers"]
    url = next(
        item["value"] for item in container["env"] if item["name"] == names.PROGRESS_URL_VARIABLE
    )
    parts = urlsplit(url.replace(f"/tasks/{TASK}/", f"/tasks/{task}/"))
    status = {"metrics": [{"name": "step", "value": str(step)}]}
    headers = {"Content-Type": "application/json"}
    if token is not None:
        headers["Authorization"] = f"Bearer {token}"
    assert parts.hostname is not None
    connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=20)
    try:
        connection.request("POST", parts.path, json.dumps({"trainerStatus": status}), headers)
        return connection.getresponse().status
    finally:
        connection.close()


@pytest.mark.parametrize(
    ("make_token", "task", "status"),
    [
        (lambda world: None, TASK, HTTPStatus.UNAUTHORIZED),
        (lambda world: "made.up.token", TASK, HTTPStatus.UNAUTHORIZED),
        (
            lambda world: world.token(world.pod("held"), "https://elsewhere"),
            TASK,
            HTTPStatus.UNAUTHORIZED,
        ),
        (lambda world: world.token(None), TASK, HTTPStatus.FORBIDDEN),
        (lambda world: world.token(world.pod("real")), TASK, HTTPStatus.FORBIDDEN),
        (lambda world: world.token(world.pod("held")), "prepare", HTTPStatus.FORBIDDEN),
        (lambda world: world.token(world.pod("held")), "02-layers-2-3", HTTPStatus.FORBIDDEN),
    ],
    ids=[
        "none",
        "made up",
        "other audience",
        "no pod's",
        "another run's pod",
        "for an earlier task",
        "for a later task",
    ],
)
def test_post_with_a_token_that_is_not_of_this_tasks_pod_changes_nothing(
    make_token: Callable[[World], str | None],
    task: str,
    status: HTTPStatus,
    world: World,
    operator: OperatorProcess,
    runs: None,
) -> None:
    before = world.run("held")
    assert post(world.pod("held"), make_token(world), task) == status
    # Longer than progress may wait for its way into the status.
    time.sleep(0.5)
    assert world.run("held") == before
    told = re.findall(r'stagetune_run_step{[^}]*run="held"[^}]*} (\S+)', operator.metrics())
    assert told
    assert 77 not in {float(value) for value in told}


def test_hugging_face_trainer_reports_without_a_change_of_its_code(
    world: World, runs: None, tmp_path: Path
) -> None:
    pod = world.pod("held")
    done = subprocess.run(
        [sys.executable, "-c", HUGGING_FACE_TRAINING, str(tmp_path / "out")],
        env=pod_environment(pod, world.token(pod), tmp_path),
        capture_output=True,
        text=True,
        check=False,
        timeout=TRAINER_SECONDS,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    loss = float(done.stdout.splitlines()[-1])
    wait_until(
        lambda: world.stage("held").get("loss") == pytest.approx(loss),
        what=f"a loss of {loss}",
        seconds=SECONDS,
    )
    assert world.stage("held")["step"] == 2


def check_metrics(programs: Path, text: str) -> None:
    """Have promtool look at what is exported: the format, the names, the units, the help."""
    done = subprocess.run(
        [str(programs / "promtool"), "check", "metrics"],
        input=text,
        capture_output=True,
        text=True,
        check=False,
        timeout=SECONDS,
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_promtool_finds_no_fault_in_what_the_operator_exports(
    operator: OperatorProcess, runs: None, programs: Path
) -> None:
    text = operator.metrics()
    for name in (
        'stagetune_failures_total{class="UserError"} 1.0',
        'stagetune_progress_posts_total{result="200"}',
        'stagetune_runs{state="Succeeded"} 1.0',
        "stagetune_run_loss{",
        "stagetune_stage_seconds_bucket{",
    ):
        assert f"\n{name}" in text, text
    check_metrics(programs, text)


def test_promtool_finds_no_fault_in_what_a_trainer_exports(
    world: World, runs: None, programs: Path
) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", world.trainer.metrics_port, timeout=10)
    try:
        connection.request("GET", "/metrics")
        text = connection.getresponse().read().decode()
    finally:
        connection.close()
    assert "\nstagetune_trainer_loss{" in text
    check_metrics(programs, text)


def test_prometheus_scrapes_the_operator_and_the_trainer(
    world: World, prometheus: Prometheus
) -> None:
    up = prometheus.await_query("count(up == 1) == 2 and on() up")
    assert [value for _, value in up] == [2]
    ((labels, loss),) = prometheus.await_query("stagetune_trainer_loss")
    assert loss > 0
    own = {"namespace": world.namespace, "run": "real", "stage": STAGE}
    assert own.items() <= labels.items()
    states = {
        labels["state"]: value
        for labels, value in prometheus.await_query("stagetune_runs")
        if value
    }
    assert states == {"Succeeded": 1, "Failed": 1, "Training": 2}
    assert prometheus.await_query("rate(stagetune_trainer_tokens_total[30s]) > 0")
    assert prometheus.query('stagetune_run_validation_loss{run="succeeded"}')


def test_last_numbers_outlive_the_trainers_process_and_the_operators(
    world: World, operator: OperatorProcess, prometheus: Prometheus
) -> None:
    prometheus.await_query("stagetune_trainer_loss")
    world.patch("real", {"suspend": True})
    world.until_state("real", "Suspended")
    prometheus.await_query('up{job="trainer"} == 0')
    assert prometheus.query("stagetune_trainer_loss") == []
    (directory,) = (world.trainer.root / "stagetune" / "runs").iterdir()
    lines = (directory / "stages" / TASK / names.METRICS_FILE).read_text().splitlines()
    last = [line.loss for line in map(Progress.model_validate_json, lines) if line.loss][-1]
    series = f'stagetune_run_loss{{run="real",stage="{STAGE}"}}'

    def scraped_since(moment: float) -> float:
        expression = f"{series} and timestamp({series}) > {moment}"
        ((_, value),) = prometheus.await_query(expression)
        return value

    assert scraped_since(time.time()) == pytest.approx(last)
    # The next operator knows what the status says, and nothing of what was posted.
    written = world.stage("real")["loss"]
    operator.kill()
    operator.start()
    assert scraped_since(time.time()) == pytest.approx(written)
