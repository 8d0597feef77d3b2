"""From a manifest to what a trainer process is given: shared by the benchmarks that train."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stagetune_api.facts import Facts
from stagetune_api.spec import StagedFineTune, StagedFineTuneSpec
from stagetune_api.stage import StageConfig, Task
from stagetune_api.training_spec import ProtectionSpec
from stagetune_api.validation import parse_manifest


def edited(document: Mapping[str, Any], edits: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of a manifest with values by path below `spec`, dots between the parts."""
    changed = copy.deepcopy(dict(document))
    for path, value in edits.items():
        *parents, last = path.split(".")
        place = changed["spec"]
        for part in parents:
            place = place.setdefault(part, {})
        place[last] = copy.deepcopy(value)
    return changed


def spec_of(document: Mapping[str, Any]) -> StagedFineTuneSpec:
    """Return the spec of a manifest; ends the program with all that is wrong with it."""
    found = parse_manifest(document)
    if not isinstance(found, StagedFineTune):
        raise SystemExit("\n".join(f"{problem.path}: {problem.message}" for problem in found))
    return found.spec


def task_config(
    spec: StagedFineTuneSpec,
    task: Task,
    *,
    name: str,
    run_directory: Path,
    work: Path,
    facts: Facts | None = None,
    **rest: Any,
) -> StageConfig:
    """Return what one task of the run `name` is given; `work` holds its inputs and its models."""
    fields: dict[str, Any] = {
        "task": task,
        "run_name": name,
        "attempt": 1,
        "run_directory": str(run_directory),
        "models_directory": str(work / "models"),
        "manifest_directory": str(work),
        "model": spec.model,
        "dataset": spec.dataset,
        "method": spec.method,
        "training": spec.training,
        "protection": spec.protection or ProtectionSpec(),
        "evaluation": spec.evaluation,
        "export": spec.export,
        "model_directory": facts.model_directory if facts else None,
        "model_digest": facts.model.digest if facts else None,
        "data_digest": facts.data.digest if facts else None,
    }
    return StageConfig(**(fields | rest))
