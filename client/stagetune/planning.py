"""The facts behind `stagetune plan`: measured ones where a run is prepared, assumed ones before."""

import json
from dataclasses import dataclass
from pathlib import Path

from stagetune.manifest_file import ManifestFile
from stagetune_api.facts import DataFacts, Facts, ModelFacts
from stagetune_api.names import RunLayout
from stagetune_api.problems import InvalidManifestError, Problem, ProblemReason
from stagetune_api.report import Outcome, StageReport
from stagetune_operator.gradient_groups import flat_profile
from stagetune_operator.model_facts import model_facts_from_config

_DEFAULT_ANSWER_SHARE = 0.5


@dataclass(frozen=True, kw_only=True)
class Assumptions:
    """What the user says of a model and data that are not there yet."""

    model_config: Path | None = None
    """A config.json of the model."""
    rows: int | None = None
    """Training rows."""
    tokens_per_row: int | None = None
    """Tokens of one row, template included; maxLength where not given."""
    answer_tokens_per_row: int | None = None
    """Tokens with a loss in one row; half of its tokens where not given."""


@dataclass(frozen=True, kw_only=True)
class PlanFacts:
    """Facts, and in words where they come from."""

    facts: Facts
    notes: tuple[str, ...]


def facts_for_plan(file: ManifestFile, run_directory: Path, given: Assumptions) -> PlanFacts:
    """Return measured facts of a prepared run, else assumed ones.

    Raises InvalidManifestError with everything that is missing and how to give it.
    """
    prepared = _prepared_facts(run_directory)
    if prepared is not None and given == Assumptions():
        note = f"Model and data as prepared in {run_directory}."
        return _with_profile(file, PlanFacts(facts=prepared, notes=(note,)))
    model, model_note = _model_facts(file, given)
    data, data_note = _data_facts(file, given)
    problems = [problem for found in (model, data) if isinstance(found, list) for problem in found]
    if isinstance(model, list) or isinstance(data, list):
        raise InvalidManifestError(problems)
    facts = Facts(model=model, data=data, model_directory="")
    return _with_profile(file, PlanFacts(facts=facts, notes=(model_note, data_note)))


def _with_profile(file: ManifestFile, found: PlanFacts) -> PlanFacts:
    """Return `found` with a flat profile of gradients where one is needed and none is measured."""
    if file.manifest.spec.gradient_profile is None or found.facts.gradients is not None:
        return found
    note = (
        "Assumed: gradient norms that are the same in all layers, so that every group trains, from "
        "the bottom up. `stagetune run` measures them; order, epochs and groups follow from that."
    )
    gradients = flat_profile(found.facts.model.num_layers)
    facts = found.facts.model_copy(update={"gradients": gradients})
    return PlanFacts(facts=facts, notes=(*found.notes, note))


def _prepared_facts(run_directory: Path) -> Facts | None:
    path = RunLayout(run_directory).task("prepare").report
    if not path.exists():
        return None
    report = StageReport.model_validate_json(path.read_bytes())
    return report.facts if report.outcome is Outcome.SUCCEEDED else None


def _model_facts(file: ManifestFile, given: Assumptions) -> tuple[ModelFacts | list[Problem], str]:
    path = given.model_config or _local_model_config(file)
    if path is None:
        problem = Problem(
            path="spec.model.source",
            reason=ProblemReason.NOT_FOUND,
            message=f"{file.manifest.spec.model.source} is not fetched yet; give its config.json "
            "with --model-config FILE",
        )
        return [problem], ""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        problem = Problem(
            path="--model-config", reason=ProblemReason.INVALID, message=f"{path}: {error}"
        )
        return [problem], ""
    return model_facts_from_config(config), f"Model shape from {path}."


def _local_model_config(file: ManifestFile) -> Path | None:
    source = file.manifest.spec.model.source
    if not source.startswith("file://"):
        return None
    path = file.directory / source.removeprefix("file://") / "config.json"
    return path if path.is_file() else None


def _data_facts(file: ManifestFile, given: Assumptions) -> tuple[DataFacts | list[Problem], str]:
    """Return assumed sizes of the data; rows of a local JSONL file are counted."""
    dataset = file.manifest.spec.dataset
    counted = _count_rows(file)
    rows = given.rows if given.rows is not None else counted
    if rows is None:
        problem = Problem(
            path="spec.dataset.source",
            reason=ProblemReason.NOT_FOUND,
            message=f"the rows of {dataset.source} are not known yet; give their number with "
            "--rows N, and --tokens-per-row N where you know it",
        )
        return [problem], ""
    fraction = dataset.validation.fraction or 0.0
    validation_rows = max(1, round(rows * fraction))
    train_rows = rows - validation_rows if fraction else rows
    tokens = given.tokens_per_row or dataset.max_length
    answers = given.answer_tokens_per_row or max(1, round(tokens * _DEFAULT_ANSWER_SHARE))
    facts = DataFacts(
        train_rows=train_rows,
        validation_rows=validation_rows,
        train_tokens=train_rows * tokens,
        train_answer_tokens=train_rows * answers,
        max_row_tokens=dataset.max_length,
    )
    source = "given" if given.rows is not None else "counted"
    return facts, (
        f"Assumed: {rows} rows ({source}) of {tokens} tokens, {answers} of them answers; "
        f"memory for a row of {dataset.max_length} tokens. `stagetune run` measures them."
    )


def _count_rows(file: ManifestFile) -> int | None:
    source = file.manifest.spec.dataset.source
    path = file.directory / source.removeprefix("file://")
    if not source.startswith("file://") or path.suffix != ".jsonl" or not path.is_file():
        return None
    with path.open("rb") as lines:
        return sum(1 for line in lines if line.strip())
