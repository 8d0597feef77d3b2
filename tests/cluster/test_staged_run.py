"""Whole runs on a real node: `kubectl apply` to the exported model, with both real images.

What a run on the cluster exports must be, bit for bit, what `stagetune run` exports from the same
manifest, whatever happens to its pods and to the operator on the way.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from ruamel.yaml import YAML
from safetensors.torch import load_file

from local_cluster.binaries import BinariesUnavailableError
from local_cluster.node import why_no_node
from local_cluster.testing import given_kubeconfig
from staged_cluster import NAMESPACE, SYSTEM, StagedCluster, digests_of_weights, staged_cluster
from tiny_workspace import build_workspace

pytestmark = pytest.mark.cluster

Object = dict[str, Any]
ROOT = Path(__file__).resolve().parents[2]
RUN_SECONDS = 600
REAL_RUN_SECONDS = 1500
# So long that a stage can be met at work, so short that the tests are not.
STAGE_EPOCHS = 60


@pytest.fixture(scope="module")
def staged(tell: Callable[[str], None]) -> Iterator[StagedCluster]:
    """A cluster of the tests' own with Stagetune on it."""
    if given_kubeconfig():
        pytest.skip("these tests look into the node's volumes; they run on their own cluster only")
    if reason := why_no_node():
        pytest.skip(reason)
    try:
        with staged_cluster(tell, "staged") as cluster:
            yield cluster
    except BinariesUnavailableError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model and rows."""
    return build_workspace(tmp_path_factory.mktemp("workspace"))


def tiny_manifest(name: str, sources: str) -> Object:
    """Return a run of two stages, its sources below `sources`."""
    return {
        "apiVersion": "stagetune.io/v1alpha1",
        "kind": "StagedFineTune",
        "metadata": {"name": name},
        "spec": {
            "model": {"source": f"{sources}/model"},
            "dataset": {
                "source": f"{sources}/rows.jsonl",
                "validation": {"fraction": 0.2},
                "maxLength": 64,
            },
            "schedule": {"stageCount": 2, "epochsPerStage": STAGE_EPOCHS},
            "training": {
                "learningRate": 1e-3,
                "batchSize": 4,
                "microBatchSize": 4,
                "checkpointIntervalSeconds": 1,
            },
            "evaluation": {"exactMatch": {"maxRows": 4, "maxNewTokens": 4}, "samples": 1},
        },
    }


def on_cluster(manifest: Object) -> Object:
    """Return `manifest` with what a cluster needs beside it."""
    resources = {
        "limits": {"nvidia.com/gpu": 1, "memory": "4Gi"},
        "requests": {"cpu": "100m", "memory": "1Gi"},
    }
    metadata = {**manifest["metadata"], "namespace": NAMESPACE}
    cluster = {"runtime": {"resources": resources}, "storage": {"size": "10Gi"}}
    return {**manifest, "metadata": metadata, "spec": {**manifest["spec"], **cluster}}


def run_locally(manifest: Object, directory: Path, seconds: float) -> dict[str, str]:
    """Run `manifest` with `stagetune run` and return the digests of its weights."""
    directory.mkdir(parents=True, exist_ok=True)
    file = directory / "manifest.yaml"
    with file.open("w") as text:
        YAML(typ="safe", pure=True).dump(manifest, text)
    # As many threads as a pod has: the number of them decides how sums are rounded.
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    run = directory / "run"
    done = subprocess.run(
        [sys.executable, "-m", "stagetune", "run", str(file), "--run-dir", str(run)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=seconds,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return digests_of_weights(run / "export")


@pytest.fixture(scope="module")
def expected(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The digests of the weights that the tiny run exports on this machine."""
    manifest = tiny_manifest("local", f"file://{workspace}")
    return run_locally(manifest, tmp_path_factory.mktemp("local"), RUN_SECONDS)


@pytest.fixture(scope="module")
def inputs(staged: StagedCluster, workspace: Path) -> str:
    """The claim with the tiny run's inputs, as a source."""
    staged.put_inputs("tiny-inputs", workspace)
    return "pvc://tiny-inputs"


def is_done(status: Object) -> bool:
    return bool(status.get("state") == "Succeeded")


def is_training(stage: int) -> Callable[[Object], bool]:
    """Return whether a stage, counted from 0, has done a few steps: its progress was posted."""

    def holds(status: Object) -> bool:
        stages = status.get("stages", [])
        return len(stages) > stage and stages[stage].get("step", 0) > 20

    return holds


def test_run_exports_what_the_local_run_exports(
    staged: StagedCluster, inputs: str, expected: dict[str, str]
) -> None:
    staged.apply(on_cluster(tiny_manifest("plain", inputs)))
    seen: list[str] = []
    status = staged.await_status(
        "plain",
        is_done,
        what="end",
        seconds=RUN_SECONDS,
        on_change=lambda status: seen.append(f"{status.get('state')} {status.get('stage')}"),
    )
    assert digests_of_weights(staged.folder("plain") / "export") == expected
    assert [stage["attempts"] for stage in status["stages"]] == [1, 1]
    # The stages were seen at work, by what their pods posted.
    assert "Training 1/2 layers-0-1" in seen
    assert "Training 2/2 layers-2-3" in seen
    assert all(stage["handoffSeconds"] > 0 for stage in status["stages"])
    assert all(stage["loss"] > 0 for stage in status["stages"])
    kept = staged.folder("plain")
    assert not (kept / "stages" / "01-layers-0-1" / "checkpoints").exists()
    assert (kept / "stages" / "01-layers-0-1" / "output" / "manifest.json").exists()


def test_pod_that_stands_by_takes_over_and_changes_no_bit(
    staged: StagedCluster, inputs: str, workspace: Path, tmp_path: Path
) -> None:
    # Its pod has to be there before the first stage ends, on a fast machine too.
    longer = {"stageCount": 2, "epochsPerStage": 3 * STAGE_EPOCHS}
    local = tiny_manifest("local", f"file://{workspace}")
    local["spec"]["schedule"] = longer
    expected = run_locally(local, tmp_path, RUN_SECONDS)
    manifest = on_cluster(tiny_manifest("standby", inputs))
    manifest["spec"]["schedule"] = longer
    # The node has one GPU, and two pods are there at once.
    del manifest["spec"]["runtime"]["resources"]["limits"]["nvidia.com/gpu"]
    staged.apply(manifest)
    status = staged.await_status("standby", is_done, what="end", seconds=RUN_SECONDS)
    assert digests_of_weights(staged.folder("standby") / "export") == expected
    (first,) = staged.pods("standby", "01-layers-0-1")
    (second,) = staged.pods("standby", "02-layers-2-3")
    state = first["status"]["containerStatuses"][0]["state"]["terminated"]
    assert second["metadata"]["creationTimestamp"] < state["finishedAt"]
    assert [stage["attempts"] for stage in status["stages"]] == [1, 1]


def test_pods_are_restricted_and_hold_one_token_for_progress_alone(
    staged: StagedCluster, inputs: str
) -> None:
    for pod in staged.pods("plain"):
        spec = pod["spec"]
        assert spec["automountServiceAccountToken"] is False
        tokens = [
            source["serviceAccountToken"]["audience"]
            for volume in spec["volumes"]
            for source in volume.get("projected", {}).get("sources", [])
        ]
        assert tokens == ["progress.stagetune.io"]
        assert spec["securityContext"]["runAsNonRoot"] is True


def with_a_long_second_stage(manifest: Object) -> Object:
    """Return `manifest` with a second stage that does not end while something is done to it."""
    spec = {part: value for part, value in manifest["spec"].items() if part != "schedule"}
    epochs = (STAGE_EPOCHS, 5 * STAGE_EPOCHS)
    layers = ({"first": 0, "last": 1}, {"first": 2, "last": 3})
    spec["stages"] = [
        {"name": f"layers-{opened['first']}-{opened['last']}", "layers": opened, "epochs": passes}
        for opened, passes in zip(layers, epochs, strict=True)
    ]
    return {**manifest, "spec": spec}


def test_killed_pod_and_killed_operator_change_no_bit(
    staged: StagedCluster, inputs: str, workspace: Path, tmp_path: Path
) -> None:
    local = with_a_long_second_stage(tiny_manifest("local", f"file://{workspace}"))
    expected = run_locally(local, tmp_path, RUN_SECONDS)
    staged.apply(on_cluster(with_a_long_second_stage(tiny_manifest("killed", inputs))))
    staged.await_status("killed", is_training(0), what="first stage", seconds=RUN_SECONDS)
    # Without a word of warning: the process is gone before it could save.
    pod = staged.pods("killed", "01-layers-0-1")[-1]["metadata"]["name"]
    delete = ("-n", NAMESPACE, "delete", "pod", pod, "--grace-period=0", "--force")
    staged.cluster.kubectl(*delete)
    staged.await_status("killed", is_training(1), what="second stage", seconds=RUN_SECONDS)
    staged.cluster.kubectl("-n", SYSTEM, "delete", "pod", "--all", "--wait=false")
    # With a warning: it saves and leaves, and its Job makes another.
    pod = staged.pods("killed", "02-layers-2-3")[-1]["metadata"]["name"]
    staged.cluster.kubectl("-n", NAMESPACE, "delete", "pod", pod, "--wait=false")
    status = staged.await_status("killed", is_done, what="end", seconds=RUN_SECONDS)
    assert digests_of_weights(staged.folder("killed") / "export") == expected
    assert status["stages"][1]["attempts"] == 1


def test_damaged_output_is_found_by_the_next_pod_and_made_again(
    staged: StagedCluster, inputs: str, expected: dict[str, str]
) -> None:
    staged.apply(on_cluster(tiny_manifest("damaged", inputs)))

    def first_is_done(status: Object) -> bool:
        stages = status.get("stages", [])
        return bool(stages) and stages[0]["state"] == "Succeeded"

    staged.await_status("damaged", is_training(0), what="first stage", seconds=RUN_SECONDS)
    staged.await_status("damaged", first_is_done, what="first output", seconds=RUN_SECONDS)
    staged.patch("damaged", {"suspend": True})
    staged.await_status(
        "damaged",
        lambda status: any(
            item["type"] == "Suspended" and item["status"] == "True"
            for item in status["conditions"]
        ),
        what="suspension",
        seconds=RUN_SECONDS,
    )
    output = staged.folder("damaged") / "stages" / "01-layers-0-1" / "output"
    weights = next(output.glob("*.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-7] ^= 1
    weights.write_bytes(content)
    staged.patch("damaged", {"suspend": False})
    status = staged.await_status("damaged", is_done, what="end", seconds=RUN_SECONDS)
    events = json.loads(
        staged.cluster.kubectl(
            *("-n", NAMESPACE, "get", "events", "-o", "json"),
            "--field-selector=involvedObject.name=damaged,type=Warning",
        )
    )["items"]
    assert any("model.safetensors" in event["message"] for event in events), events
    assert status["stages"][0]["attempts"] == 2
    assert digests_of_weights(staged.folder("damaged") / "export") == expected


def on_two_nodes(manifest: Object) -> Object:
    """Return `manifest` for two pods a stage; both are on the one node, which has one GPU."""
    document = on_cluster(manifest)
    resources = {"limits": {"memory": "3Gi"}, "requests": {"cpu": "100m", "memory": "1Gi"}}
    document["spec"]["runtime"] = {"nodes": 2, "resources": resources}
    document["spec"]["storage"]["accessMode"] = "ReadWriteMany"
    return document


def test_two_pods_train_a_stage_as_one_process_does(
    staged: StagedCluster, inputs: str, workspace: Path, tmp_path: Path
) -> None:
    def short(name: str, sources: str) -> Object:
        manifest = tiny_manifest(name, sources)
        manifest["spec"]["schedule"] = {"stageCount": 2, "epochsPerStage": 3}
        manifest["spec"]["training"]["microBatchSize"] = 2
        return manifest

    staged.apply(on_two_nodes(short("two-pods", inputs)))
    status = staged.await_status("two-pods", is_done, what="end", seconds=RUN_SECONDS)
    assert [stage["attempts"] for stage in status["stages"]] == [1, 1]
    for stage in ("01-layers-0-1", "02-layers-2-3"):
        pods = staged.pods("two-pods", stage)
        assert [pod["status"]["phase"] for pod in pods] == ["Succeeded", "Succeeded"]
    assert status["stages"][0]["validationLoss"] > status["stages"][1]["validationLoss"]

    run_locally(short("local", f"file://{workspace}"), tmp_path, RUN_SECONDS)
    for path in (tmp_path / "run" / "export").glob("*.safetensors"):
        alone = load_file(path)
        together = load_file(staged.folder("two-pods") / "export" / path.name)
        assert alone.keys() == together.keys()
        for name, tensor in alone.items():
            torch.testing.assert_close(together[name], tensor, rtol=0, atol=2e-4, msg=name)

    staged.cluster.kubectl("-n", NAMESPACE, "delete", "sft", "two-pods", "--wait=true")
    gone = ("-n", NAMESPACE, "wait", "--for=delete", "service/stagetune-two-pods", "--timeout=60s")
    assert staged.cluster.try_kubectl(*gone).returncode == 0


@pytest.mark.real_model
def test_quick_start_on_the_node_exports_what_it_exports_here(
    staged: StagedCluster, tmp_path: Path
) -> None:
    quickstart = ROOT / "examples" / "quickstart"
    subprocess.run([sys.executable, str(quickstart / "build_inputs.py")], check=True, timeout=600)
    yaml = YAML(typ="safe", pure=True)
    local = yaml.load((quickstart / "finance-qa.yaml").read_text())
    remote = yaml.load((quickstart / "finance-qa-cluster.yaml").read_text())
    for manifest in (local, remote):
        # The same path on a part of the rows; `make cluster-demo` goes it on all of them.
        manifest["spec"]["schedule"] = {"dataFraction": 0.05}
        manifest["spec"]["dataset"]["validation"] = {"fraction": 0.04}
        manifest["spec"]["evaluation"]["exactMatch"]["maxRows"] = 4
        manifest["spec"]["evaluation"]["generalText"]["maxTokens"] = 500
    for path, source in _sources(local).items():
        _replace(local, path, source.replace("file://", f"file://{quickstart}/"))
    weights = run_locally(local, tmp_path / "local", REAL_RUN_SECONDS)
    claimed = tmp_path / "claimed"
    claimed.mkdir()
    (claimed / "inputs").symlink_to(quickstart / "inputs")
    (claimed / "general_text.jsonl").symlink_to(quickstart / "general_text.jsonl")
    staged.put_inputs("finance-qa-inputs", claimed)
    remote["metadata"]["namespace"] = NAMESPACE
    staged.apply(remote)
    status = staged.await_status("finance-qa", is_done, what="end", seconds=REAL_RUN_SECONDS)
    assert len(status["stages"]) == 2
    assert digests_of_weights(staged.folder("finance-qa") / "export") == weights
    losses = [stage["validationLoss"] for stage in status["stages"]]
    assert losses[-1] < losses[0]


def _sources(manifest: Object) -> dict[tuple[str, ...], str]:
    spec = manifest["spec"]
    return {
        ("model", "source"): spec["model"]["source"],
        ("dataset", "source"): spec["dataset"]["source"],
        ("evaluation", "generalText", "source"): spec["evaluation"]["generalText"]["source"],
    }


def _replace(manifest: Object, path: tuple[str, ...], value: str) -> None:
    place = manifest["spec"]
    for part in path[:-1]:
        place = place[part]
    place[path[-1]] = value
