"""Several processes for one stage: the numbers of one process, and nobody waits for ever.

Real processes over gloo, started as in a pod. Each test ends by itself or by its own time limit.
"""

import importlib.metadata
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file

from stagetune_api import names
from stagetune_api.names import TrainerExitCode
from stagetune_api.report import FailureClass, Outcome, StageReport
from stagetune_api.stage import StageConfig
from stagetune_trainer.run import run_task
from stop_requests import AfterChecks, NeverAsked

try:
    importlib.metadata.version("deepspeed")
except importlib.metadata.PackageNotFoundError:
    pytest.skip("DeepSpeed is not installed", allow_module_level=True)

MakeConfig = Callable[..., StageConfig]
TIME_LIMIT_SECONDS = 480
ROUNDING = {"rtol": 0.0, "atol": 2e-5}
"""Weights differ by the order of sums; AdamW's first steps divide them by themselves."""
ZERO2 = {"processesPerNode": 2, "zeroStage": 2}
ZERO3 = {"processesPerNode": 2, "zeroStage": 3}
THREE = {"processesPerNode": 3, "zeroStage": 3}
EXPAND = {"type": "Expand", "expand": {"layersPerBlock": 1}}
EVERYTHING = {
    "distillation": {"weight": 0.5, "topK": 32},
    "anchor": {"weight": 0.1},
    "replay": {"ratio": 0.5, "generated": {"tokens": 400}},
}


class Ended(NamedTuple):
    code: int
    report: StageReport
    weights: dict[str, torch.Tensor]
    losses: list[dict[str, float]]
    """All terms of every step's loss."""
    log: str


class Stage:
    """A stage of a tiny model, of its middle layers unless told; the next one after a `chain`."""

    def __init__(self, root: Path, later: MakeConfig, make_stage: Callable[..., Any]) -> None:
        self._root = root
        self._later = later
        self._make_stage = make_stage

    def config(
        self,
        engine: Any = None,
        *,
        layers: tuple[int, int] = (1, 2),
        chain: Sequence[StageReport] = (),
        cached: bool = False,
        steps: int = 8,
        **fields: Any,
    ) -> StageConfig:
        numbers = {"steps": steps, "validationInterval": 4, "epochs": steps / 8}
        cache = {"prefixCache": {"used": True, "reason": "asked for"}} if cached else {}
        stage = self._make_stage(len(chain), *layers, **numbers, **cache)
        return self._later("Train", stage=stage, chain=chain, engine=engine, **fields)

    def alone(self, config: StageConfig, stop: Any = None) -> Ended:
        """Train in this process."""
        report, code = run_task(config, stop or NeverAsked())
        return self._ended(int(code), report, "")

    def start(self, config: StageConfig, **environment: str) -> "subprocess.Popen[str]":
        path = self._root / "stage.json"
        path.write_text(config.model_dump_json(), encoding="utf-8")
        command = [sys.executable, "-m", "stagetune_trainer", str(path)]
        message = self._message(environment)
        message.unlink(missing_ok=True)
        return subprocess.Popen(
            [*command, f"--termination-message={message}"],
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def _message(self, environment: Mapping[str, str]) -> Path:
        return self._root / f"message-{environment.get(names.POD_INDEX_VARIABLE, '0')}"

    def wait(self, process: "subprocess.Popen[str]", index: int = 0) -> Ended:
        try:
            _, log = process.communicate(timeout=TIME_LIMIT_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise
        report = StageReport.model_validate_json((self._root / f"message-{index}").read_text())
        return self._ended(process.returncode, report, log)

    def together(self, config: StageConfig) -> Ended:
        """Train in as many processes as the config's engine has."""
        return self.wait(self.start(config))

    def _ended(self, code: int, report: StageReport, log: str) -> Ended:
        if report.output is None:
            return Ended(code, report, {}, [], log)
        output = Path(report.output.path)
        weights = load_file(output / names.WEIGHTS_FILE)
        return Ended(code, report, weights, losses(output.parent / names.METRICS_FILE), log)


def losses(metrics: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    steps = [line for line in lines if line["kind"] == "Step"]
    # AdamW undoes a wrong scale of gradients; their norm shows it.
    return [
        {**line.get("losses", {"answers": line["loss"]}), "gradNorm": line["gradNorm"]}
        for line in steps
    ]


@pytest.fixture
def stage(
    tmp_path: Path, make_later_config: MakeConfig, make_stage: Callable[..., dict[str, Any]]
) -> Stage:
    return Stage(tmp_path, make_later_config, make_stage)


def assert_trained_alike(shared: Ended, alone: Ended) -> None:
    assert shared.report.failure is None, shared.log[-4000:]
    assert shared.code == TrainerExitCode.SUCCEEDED
    for step, (terms, those) in enumerate(zip(shared.losses, alone.losses, strict=True)):
        assert terms == pytest.approx(those, abs=2e-5, rel=1e-5), f"step {step}"
    assert shared.weights.keys() == alone.weights.keys()
    for name, expected in alone.weights.items():
        torch.testing.assert_close(shared.weights[name], expected, **ROUNDING, msg=name)
    found, wanted = shared.report.train, alone.report.train
    assert found is not None
    assert wanted is not None
    assert found.tokens == wanted.tokens
    assert found.trainable_parameters == wanted.trainable_parameters
    for field in ("loss", "initial_validation_loss", "validation_loss", "kl_to_base"):
        assert getattr(found, field) == pytest.approx(getattr(wanted, field), abs=2e-5), field


def removed(run: Path) -> None:
    """Let the next attempt at the stage begin anew."""
    (run / "stages").rename(run / f"stages-{time.monotonic_ns()}")


@pytest.mark.parametrize(
    ("engine", "fields"),
    [
        (ZERO2, {}),
        (ZERO3, {}),
        (ZERO2, {"method": EXPAND}),
        (ZERO3, {"method": EXPAND}),
        ({**ZERO2, "offload": "Optimizer"}, {"method": {"type": "LoRA", "lora": {"rank": 4}}}),
        (
            {**ZERO3, "offload": "OptimizerAndParameters"},
            {"method": {"type": "LoRA", "lora": {"rank": 4}}},
        ),
    ],
    ids=[
        "zero2-full",
        "zero3-full",
        "zero2-expand",
        "zero3-expand",
        "zero2-lora-offload",
        "zero3-lora-offload",
    ],
)
def test_two_processes_train_what_one_does(
    engine: Any, fields: Any, stage: Stage, tmp_path: Path
) -> None:
    training = {"training": {"microBatchSize": 1, "earlyStopping": {"patience": 5}}}
    alone = stage.alone(stage.config(**training, **fields))
    removed(tmp_path / "run")
    assert_trained_alike(stage.together(stage.config(engine, **training, **fields)), alone)


@pytest.mark.parametrize("engine", [ZERO2, ZERO3], ids=["zero2", "zero3"])
def test_two_processes_protect_a_stage_above_a_cache_as_one_does(
    engine: Any, stage: Stage, tmp_path: Path
) -> None:
    """Three micro-batches of a step are its own and two are replayed.

    So once the processes have one of each kind, and once both compute the same.
    """
    training = {"batchSize": 3, "microBatchSize": 1}
    fields: dict[str, Any] = {"training": training, "protection": EVERYTHING}
    below = stage.alone(stage.config(layers=(0, 0), **fields)).report
    later: dict[str, Any] = {"chain": [below], "cached": True, **fields}
    alone = stage.alone(stage.config(**later))
    cache = tmp_path / "run" / "cache"
    shutil.rmtree(cache)
    shutil.rmtree(tmp_path / "run" / "stages" / "02-layers-1-2")
    assert_trained_alike(stage.together(stage.config(engine, **later)), alone)
    assert alone.losses[0].keys() == {"answers", "distillation", "anchor", "replay", "gradNorm"}
    assert {path.name for path in cache.iterdir()} == {
        "prefix-1",
        "teacher-train",
        "teacher-validation",
    }


def test_launchers_of_two_pods_train_together(stage: Stage, tmp_path: Path) -> None:
    training = {"training": {"microBatchSize": 1}}
    alone = stage.alone(stage.config(**training))
    removed(tmp_path / "run")
    config = stage.config({"processesPerNode": 1, "nodes": 2, "zeroStage": 2}, **training)
    pods = [
        stage.start(
            config,
            **{
                names.COORDINATOR_VARIABLE: "127.0.0.1",
                names.POD_INDEX_VARIABLE: str(index),
                "GLOO_SOCKET_IFNAME": "lo",
            },
        )
        for index in (0, 1)
    ]
    first, second = (stage.wait(pod, index) for index, pod in enumerate(pods))
    assert_trained_alike(first, alone)
    assert second.code == TrainerExitCode.SUCCEEDED
    assert second.report.output is None


def interrupted(ended: Ended, step: int) -> None:
    assert ended.code == TrainerExitCode.INTERRUPTED, ended.log[-4000:]
    assert ended.report.outcome is Outcome.INTERRUPTED
    assert ended.report.failure is not None
    assert f"saved after step {step} of" in ended.report.failure.message


def read_until(process: "subprocess.Popen[str]", kind: str, step: int) -> None:
    """Read progress until a line of `kind` is at `step` or beyond."""
    assert process.stdout is not None
    for line in process.stdout:
        said = json.loads(line) if line.startswith("{") else {}
        if said.get("kind") == kind and said.get("step", 0) >= step:
            return
    raise AssertionError(f"no {kind} at step {step}: {process.stderr and process.stderr.read()}")


def test_stage_goes_on_with_another_number_of_processes(stage: Stage, tmp_path: Path) -> None:
    training = {"training": {"microBatchSize": 1, "earlyStopping": {"patience": 9}}}
    alone = stage.alone(stage.config(steps=16, **training))
    removed(tmp_path / "run")
    # One process, then two that are asked to leave, then three, which divide neither the batch nor
    # the size of any tensor.
    interrupted(stage.alone(stage.config(steps=16, **training), AfterChecks(40)), step=6)
    process = stage.start(stage.config(ZERO2, steps=16, **training))
    read_until(process, "Step", 7)
    process.terminate()
    left = stage.wait(process)
    assert left.report.outcome is Outcome.INTERRUPTED, left.log[-4000:]
    checkpoints = tmp_path / "run" / "stages" / "01-layers-1-2" / "checkpoints"
    saved = max(int(path.name.removeprefix("step-")) for path in checkpoints.glob("step-*"))
    assert 7 <= saved < 16
    interrupted(left, step=saved)
    assert_trained_alike(stage.together(stage.config(THREE, steps=16, **training)), alone)


def test_what_processes_saved_one_process_goes_on_from(stage: Stage, tmp_path: Path) -> None:
    training = {"training": {"microBatchSize": 1, "checkpointIntervalSeconds": 1}}
    alone = stage.alone(stage.config(steps=16, **training))
    removed(tmp_path / "run")
    process = stage.start(stage.config(ZERO3, steps=16, **training))
    read_until(process, "Checkpoint", 1)
    # With its launcher gone nobody else may go on for ever.
    process.kill()
    process.communicate(timeout=TIME_LIMIT_SECONDS)
    assert_trained_alike(stage.alone(stage.config(steps=16, **training)), alone)


@pytest.mark.parametrize("rank", [0, 1])
def test_death_of_one_process_ends_the_stage_with_its_failure(rank: int, stage: Stage) -> None:
    process = stage.start(stage.config(ZERO2, steps=400))
    read_until(process, "Step", 2)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    environments = {
        int(child): Path(f"/proc/{child}/environ").read_bytes().split(b"\0") for child in children
    }
    (victim,) = [
        child for child, variables in environments.items() if f"RANK={rank}".encode() in variables
    ]
    os.kill(victim, signal.SIGKILL)
    ended = stage.wait(process)
    failure = ended.report.failure
    assert failure is not None
    assert failure.failure_class is FailureClass.DISRUPTED
    assert f"process {rank + 1} of 2 was ended by signal 9" in failure.message
    assert ended.code == TrainerExitCode.INTERNAL
    assert not any(Path(f"/proc/{child}").exists() for child in environments)


def test_failure_of_one_process_is_the_stage_s(stage: Stage) -> None:
    # The others wait for it while it loads.
    ended = stage.together(stage.config(ZERO2, data_digest="0" * 64))
    assert ended.code == TrainerExitCode.STORAGE_ERROR, ended.log[-4000:]
    assert ended.report.failure is not None
    assert ended.report.failure.failure_class is FailureClass.STORAGE_ERROR
    assert ended.report.failure.artifact is not None
