"""Training and measuring one cell of benchmarks/quality.py, in the process of `quality_cell`.

The stages are trained by the trainer's own task, one after the other in this process, so that no
arm pays for imports. `seconds` are those of the processor: with one thread that is what the cell
takes on an idle core, whatever else the machine does.
"""

import json
import resource
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional
from transformers import AutoTokenizer

from quality_arms import BASE_FILE, Cell
from stagetune_api.facts import Facts
from stagetune_api.names import RunLayout
from stagetune_api.spec import StagedFineTuneSpec
from stagetune_api.stage import ParentRef, PlannedStage, StageConfig, Task
from stagetune_operator.estimate import Machine
from stagetune_operator.plan import Plan, make_plan
from stagetune_trainer.assemble import assemble, load_base_for_export
from stagetune_trainer.checkpoint import Fence
from stagetune_trainer.data.batches import (
    FixedRows,
    open_general_rows,
    open_validation_questions,
    open_validation_rows,
)
from stagetune_trainer.data.prepare import prepare
from stagetune_trainer.decoder import Decoder
from stagetune_trainer.evaluate import answer, finished_model, is_exact_match
from stagetune_trainer.loss import AnswerLoss
from stagetune_trainer.metrics import ProgressLog
from stagetune_trainer.start_clock import StartClock
from stagetune_trainer.train import train_stage
from trainer_tasks import spec_of, task_config

CPU = torch.device("cpu")
BASE_TENSORS, TRAINED_FILE = "base.safetensors", "trained.json"


class NeverStop:
    """Nobody asks a cell to stop."""

    requested = False


@dataclass(frozen=True, kw_only=True)
class Trained:
    """The stages of a cell, as they lie in its folder, and what training them took."""

    chain: list[ParentRef]
    facts: Facts
    stages: list[PlannedStage]
    measured: dict[str, Any]


def run(cell: Cell, work: Path) -> Iterator[dict[str, Any]]:
    """Train `cell` and yield what is measured: its own result, then those of its derived arms.

    The trained stages stay in the cell's folder until all of it is measured.
    """
    torch.use_deterministic_algorithms(True, warn_only=True)
    root = work / "runs" / cell.id
    spec = spec_of(cell.manifest())
    trained = _read(root / TRAINED_FILE) or _train(cell, spec, root, work)
    known = {"rate": cell.rate, "passes": cell.passes, "seed": cell.seed, **trained.measured}
    config = _config(
        spec,
        root,
        work,
        Task.EVALUATE,
        trained.facts,
        chain=trained.chain,
        stages=trained.stages,
    )
    base = _base(config, work)
    yield {
        "id": cell.id,
        "arm": cell.arm.name,
        **known,
        **_measure(assemble(config, CPU), config, base),
    }
    for suffix, derived in cell.arm.derived.items():
        started = time.process_time()
        decoder, extra = _derive(spec_of(cell.manifest(derived.edits)), config)
        seconds = trained.measured["seconds"] + time.process_time() - started
        yield {
            "id": cell.derived_id(suffix),
            "arm": f"{cell.arm.name}-{suffix}",
            **known,
            **extra,
            "seconds": round(seconds, 1),
            **_measure(decoder, config, base),
        }
    shutil.rmtree(root)


def _train(cell: Cell, spec: StagedFineTuneSpec, root: Path, work: Path) -> Trained:
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    started = time.process_time()
    facts = prepare(_config(spec, root, work, Task.PREPARE, None))
    prepare_seconds = time.process_time() - started
    plan = make_plan(spec, facts, Machine(is_gpu=False))
    if not isinstance(plan, Plan):
        raise SystemExit("\n".join(f"{problem.path}: {problem.message}" for problem in plan))
    chain: list[ParentRef] = []
    log = ProgressLog(task=Task.TRAIN, name=cell.id, attempt=1, sinks=())
    started = time.process_time()
    for stage in plan.stages:
        config = _config(spec, root, work, Task.TRAIN, facts, stage=stage, chain=list(chain))
        layout = RunLayout(root).stage(stage.directory)
        layout.root.mkdir(parents=True, exist_ok=True)
        report = train_stage(config, log, NeverStop(), Fence(layout.fence, 1), StartClock())
        if report.output is None:
            raise RuntimeError(f"{stage.name} left no output")
        chain.append(ParentRef(path=report.output.path, digest=report.output.digest))
    seconds = time.process_time() - started
    if spec.gradient_profile or (spec.protection and spec.protection.replay):
        # What prepare does for this arm alone is a part of its cost.
        seconds += prepare_seconds
    measured = {
        "steps": sum(stage.steps for stage in plan.stages),
        "stages": len(plan.stages),
        "prepareSeconds": round(prepare_seconds, 1),
        "seconds": round(seconds, 1),
        "peakMemoryBytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    trained = Trained(chain=chain, facts=facts, stages=plan.stages, measured=measured)
    text = json.dumps(
        {
            "chain": [parent.model_dump(mode="json") for parent in chain],
            "facts": facts.model_dump(mode="json"),
            "stages": [stage.model_dump(mode="json") for stage in plan.stages],
            "measured": measured,
        }
    )
    (root / TRAINED_FILE).write_text(text, encoding="utf-8")
    return trained


def _read(path: Path) -> Trained | None:
    if not path.exists():
        return None
    found = json.loads(path.read_text(encoding="utf-8"))
    return Trained(
        chain=[ParentRef.model_validate(parent) for parent in found["chain"]],
        facts=Facts.model_validate(found["facts"]),
        stages=[PlannedStage.model_validate(stage) for stage in found["stages"]],
        measured=found["measured"],
    )


def _config(
    spec: StagedFineTuneSpec, root: Path, work: Path, task: Task, facts: Facts | None, **rest: Any
) -> StageConfig:
    if task is Task.PREPARE:
        rest["gradient_norm"] = spec.gradient_profile
    if task is Task.TRAIN:
        # No arm pays for what is measured here anyway.
        rest["evaluation"] = spec.evaluation.model_copy(update={"general_text": None})
    return task_config(
        spec, task, name="quality", run_directory=root, work=work, facts=facts, **rest
    )


def _derive(spec: StagedFineTuneSpec, config: StageConfig) -> tuple[Decoder, dict[str, Any]]:
    """Return the model of the trained stages put together as `spec` says, and what was chosen."""
    config = config.model_copy(update={"protection": spec.protection})
    log = ProgressLog(task=Task.EVALUATE, name="derive", attempt=1, sinks=())
    decoder, averaging = finished_model(config, CPU, log)
    return decoder, {"alpha": averaging.chosen} if averaging else {}


def _base(config: StageConfig, work: Path) -> dict[str, Tensor]:
    """Return the base model's answers' log-probabilities; its scores are written beside them."""
    path = work / BASE_TENSORS
    if not path.exists():
        decoder = load_base_for_export(config, CPU)
        decoder.model.train(False)
        scores = _measure(decoder, config, None)
        tensors = {"log_probabilities": _answer_log_probabilities(decoder, config)}
        draft = path.with_suffix(f".{config.training.seed}.tmp")
        save_file(tensors, draft)
        (work / BASE_FILE).write_text(json.dumps(scores) + "\n")
        draft.rename(path)
    return load_file(path)


@torch.no_grad()
def _measure(
    decoder: Decoder, config: StageConfig, base: dict[str, Tensor] | None
) -> dict[str, Any]:
    """Return the scores of a model, row by row where rows are paired between arms."""
    decoder.model.train(False)
    loss = AnswerLoss(decoder)
    validation = _row_losses(loss, open_validation_rows(_by_row(config)))
    general = _row_losses(loss, open_general_rows(_by_row(config)))
    questions = open_validation_questions(config)
    tokenizer = AutoTokenizer.from_pretrained(config.model_directory, trust_remote_code=False)
    exact_match = config.evaluation.exact_match
    answers = answer(
        decoder, tokenizer, questions, exact_match.max_new_tokens if exact_match else 12
    )
    matches = [
        is_exact_match(text, question.reference)
        for text, question in zip(answers, questions, strict=True)
    ]
    divergence = None
    if base is not None:
        found = _answer_log_probabilities(decoder, config)
        expected = base["log_probabilities"]
        total = functional.kl_div(found, expected, reduction="sum", log_target=True)
        divergence = float(total) / len(found)
    return {
        "exactMatch": sum(matches) / len(matches),
        "validationLoss": _mean(validation),
        "generalLoss": _mean(general),
        "klToBase": divergence,
        "matches": [int(match) for match in matches],
        "generalRows": [[round(total, 4), count] for total, count in general],
    }


def _by_row(config: StageConfig) -> StageConfig:
    training = config.training.model_copy(update={"micro_batch_size": 1})
    return config.model_copy(update={"training": training})


def _row_losses(loss: AnswerLoss, rows: FixedRows) -> list[tuple[float, int]]:
    """Return each row's summed loss in nats and its number of labelled tokens."""
    found = []
    for batch in rows.batches():
        total, count = loss(*batch.on(CPU))
        found.append((float(total), int(count)))
    return found


def _mean(rows: list[tuple[float, int]]) -> float:
    return sum(total for total, _ in rows) / sum(count for _, count in rows)


@torch.no_grad()
def _answer_log_probabilities(decoder: Decoder, config: StageConfig) -> Tensor:
    """Return log-probabilities [answer tokens, vocabulary] at the validation answers."""
    loss = AnswerLoss(decoder)
    parts = []
    for batch in open_validation_rows(config).batches():
        features, _ = loss.features(*batch.on(CPU))
        parts.append(functional.log_softmax(loss.head.logits(features).float(), dim=-1))
    return torch.cat(parts)
