"""Whoever started the container learns how it ended, whatever went wrong."""

import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from stagetune_api.facts import DataFacts, Facts, LayerFacts, ModelFacts
from stagetune_api.names import TERMINATION_MESSAGE_MAX_BYTES, TrainerExitCode
from stagetune_api.report import (
    CheckpointRef,
    EvaluationResult,
    Failure,
    FailureClass,
    ModelScores,
    Outcome,
    SampleAnswer,
    StageReport,
    Timings,
    TrainResult,
)
from stagetune_api.stage import StageConfig, Task
from stagetune_trainer.__main__ import main

MakeConfig = Callable[..., StageConfig]
DIGEST = "0123456789abcdef" * 4
QWEN_2_5_7B = {
    "self_attn.q_proj": (3584, 3584),
    "self_attn.k_proj": (3584, 512),
    "self_attn.v_proj": (3584, 512),
    "self_attn.o_proj": (3584, 3584),
    "mlp.gate_proj": (3584, 18944),
    "mlp.up_proj": (3584, 18944),
    "mlp.down_proj": (18944, 3584),
}
NINE_MODULES = {
    **QWEN_2_5_7B,
    "self_attn.kv_a_proj_with_mqa": (3584, 18944),
    "mlp.shared_expert_gate_projection": (18944, 3584),
}


@pytest.fixture(autouse=True)
def _process_as_before() -> Iterator[None]:
    """`main` takes over the signals and fills in the environment."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    environment = dict(os.environ)
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
    os.environ.clear()
    os.environ.update(environment)


def run(config: StageConfig | str, tmp_path: Path) -> tuple[int, StageReport]:
    text = config if isinstance(config, str) else config.model_dump_json(exclude_none=True)
    (tmp_path / "stage.json").write_text(text)
    message = tmp_path / "termination-log"
    code = main([str(tmp_path / "stage.json"), f"--termination-message={message}"])
    return code, StageReport.model_validate_json(message.read_bytes())


def facts(linear_shapes: dict[str, tuple[int, int]]) -> Facts:
    return Facts(
        model=ModelFacts(
            model_type="qwen2",
            num_layers=28,
            hidden_size=3584,
            intermediate_size=18944,
            vocab_size=152064,
            num_attention_heads=28,
            head_dim=128,
            tied_embeddings=False,
            layer=LayerFacts(parameters=233057792, linear_shapes=linear_shapes),
            embedding_parameters=544997376,
            head_parameters=544997376,
            final_norm_parameters=3584,
            dtype_bytes=2,
            digest=DIGEST,
        ),
        data=DataFacts(
            train_rows=10**9,
            validation_rows=10**8,
            train_tokens=10**13,
            train_answer_tokens=10**13,
            max_row_tokens=1048576,
            digest=DIGEST,
        ),
        model_directory=f"/stagetune-models/{DIGEST[:16]}",
    )


def report(**fields: Any) -> StageReport:
    values = {
        "task": Task.PREPARE,
        "name": "prepare",
        "attempt": 999999,
        "outcome": Outcome.SUCCEEDED,
        "seconds": 123456.78901,
        "timings": Timings(
            start_time="2026-07-01T12:00:00.000Z",
            imports_seconds=12.345,
            load_seconds=123.456,
            first_step_time="2026-07-01T12:00:00.000Z",
        ),
        "output": CheckpointRef(
            path="/stagetune/runs/" + "r" * 49 + "/stages/01-" + "s" * 16 + "/output",
            digest=DIGEST,
            step=10**6,
        ),
    }
    return StageReport.model_validate({**values, **fields})


@pytest.mark.parametrize("shapes", [QWEN_2_5_7B, NINE_MODULES])
def test_facts_of_real_models_come_through_whole(shapes: dict[str, tuple[int, int]]) -> None:
    message = report(facts=facts(shapes)).termination_message()
    assert len(message.encode()) < TERMINATION_MESSAGE_MAX_BYTES / 2
    assert StageReport.model_validate_json(message).facts == facts(shapes)


def test_results_of_a_stage_and_of_an_evaluation_come_through() -> None:
    train = TrainResult(
        steps=10**6,
        planned_steps=10**6,
        stopped_early=False,
        best_step=10**6,
        loss=1 / 3,
        initial_validation_loss=1 / 3,
        validation_loss=1 / 3,
        trainable_parameters=10**10,
        tokens=10**13,
        tokens_per_second=1e4 / 3,
        train_seconds=1e6 / 3,
    )
    scores = ModelScores(validation_loss=1 / 3, exact_match=1 / 3, general_loss=1 / 3)
    sample = SampleAnswer(question="問" * 8192, reference="r", before="b", after="a")
    evaluation = EvaluationResult(
        before=scores, after=scores, exact_match_rows=1000, samples=[sample] * 20
    )
    for result in (report(train=train), report(evaluation=evaluation)):
        message = result.termination_message()
        assert len(message.encode()) < TERMINATION_MESSAGE_MAX_BYTES / 2
        found = StageReport.model_validate_json(message)
        assert found.train == result.train
        assert found.evaluation is None or found.evaluation.after == scores


@pytest.mark.parametrize("text", ["x", "錯", "\x01", '"'])
def test_failure_fits_however_long_its_texts_are(text: str) -> None:
    failure = Failure(
        failure_class=FailureClass.STORAGE_ERROR,
        exit_code=44,
        message=text * 8192,
        log_tail=text * 8192,
        artifact="/stagetune/" + "x" * 400,
    )
    message = report(outcome=Outcome.FAILED, failure=failure).termination_message()
    assert len(message.encode()) <= TERMINATION_MESSAGE_MAX_BYTES
    found = StageReport.model_validate_json(message).failure
    assert found is not None
    assert found.message.startswith(text * 128)
    assert found.artifact == failure.artifact


@pytest.mark.parametrize(
    ("stage_file", "said"),
    [
        ("{", "Invalid JSON"),
        ('{"task": "Prepare", "runNmae": "x"}', "runNmae"),
        ("", "Invalid JSON"),
    ],
)
def test_stage_file_that_cannot_be_read_is_our_own_mistake(
    stage_file: str, said: str, tmp_path: Path
) -> None:
    code, found = run(stage_file, tmp_path)
    assert code == TrainerExitCode.INTERNAL
    assert found.failure is not None
    assert found.failure.failure_class is FailureClass.INTERNAL
    assert said in found.failure.message
    assert (found.task, found.attempt) == (None, 0)


def test_stage_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    message = tmp_path / "termination-log"
    missing = tmp_path / "nowhere.json"
    code = main([str(missing), f"--termination-message={message}"])
    assert code == TrainerExitCode.INTERNAL
    assert str(missing) in json.loads(message.read_text())["failure"]["message"]


def test_run_folder_that_cannot_be_written_is_told_all_the_same(
    make_stage_config: MakeConfig, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("a volume that is no folder")
    config = make_stage_config(attempt=0, run_directory=str(tmp_path / "file" / "run"))
    code, found = run(config, tmp_path)
    assert code == TrainerExitCode.STORAGE_ERROR
    assert found.failure is not None
    assert "Not a directory" in found.failure.message


def test_fenced_attempt_says_so(make_stage_config: MakeConfig, tmp_path: Path) -> None:
    fence = tmp_path / "run" / "tasks" / "prepare" / "fence"
    fence.mkdir(parents=True)
    (fence / "000007").touch()
    code, found = run(make_stage_config(attempt=3), tmp_path)
    assert code == TrainerExitCode.FENCED
    assert found.failure is not None
    assert found.failure.failure_class is FailureClass.FENCED


def test_message_is_the_newest_report_and_nothing_else(
    make_stage_config: MakeConfig, tmp_path: Path
) -> None:
    (tmp_path / "termination-log").write_text("x" * 5000)
    code, found = run(make_stage_config(attempt=0), tmp_path)
    assert code == TrainerExitCode.SUCCEEDED
    assert found.facts is not None
    assert found.attempt == 1


def test_message_that_cannot_be_written_leaves_the_exit_code_to_speak(
    make_stage_config: MakeConfig, tmp_path: Path
) -> None:
    path = tmp_path / "stage.json"
    path.write_text(make_stage_config(attempt=0).model_dump_json())
    for place in (tmp_path, Path("/proc/termination-log"), Path("/dev/full")):
        assert main([str(path), f"--termination-message={place}"]) == TrainerExitCode.SUCCEEDED


def test_facts_that_do_not_fit_are_a_failure_with_a_message(
    make_stage_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = {f"mlp.experts.{index}.intermediate_projection": (4096, 14336) for index in range(64)}
    long = report(facts=facts(shapes))
    with pytest.raises(ValueError, match="does not fit"):
        long.termination_message()
    monkeypatch.setattr(
        "stagetune_trainer.run.run_task", lambda *_, **__: (long, TrainerExitCode.SUCCEEDED)
    )
    code, found = run(make_stage_config(), tmp_path)
    assert code == TrainerExitCode.INTERNAL
    assert found.failure is not None
    assert "does not fit a termination message" in found.failure.message
