"""What a run's folder says of the run: its manifest, its plan, and what is done already."""

from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from stagetune_api import names
from stagetune_api.artifact import digest_of_json
from stagetune_api.facts import Facts
from stagetune_api.names import RunLayout, StageLayout
from stagetune_api.problems import InvalidManifestError, Problem, ProblemReason
from stagetune_api.report import Outcome, StageReport
from stagetune_api.spec import StagedFineTune
from stagetune_api.stage import StageConfig, Task
from stagetune_operator.plan import Plan

_Model = TypeVar("_Model", bound=BaseModel)


def changed_fields(manifest: StagedFineTune, layout: RunLayout) -> list[Problem]:
    """Return a problem for each field that differs from the run that is prepared in `layout`.

    A run is one manifest: what is trained already was trained as it said then.
    """
    path = layout.root / names.RUN_MANIFEST_FILE
    if not path.exists() or not layout.plan.exists():
        return []
    before = _comparable(_read(StagedFineTune, path, "the manifest that the run was planned with"))
    now = _comparable(manifest)
    return [
        Problem(
            path=f"spec.{field}",
            reason=ProblemReason.CONFLICT,
            message=f"is {after!r}, and was {earlier!r} when the run in {layout.root} was planned; "
            "put it back, or give the run another metadata.name",
        )
        for field, earlier, after in _differences(before, now)
    ]


def _comparable(manifest: StagedFineTune) -> dict[str, object]:
    """Return the spec without what may change at any time because it changes no result.

    Those are how often to save, the prefix cache, and what counts on clusters only.
    """
    spec = manifest.spec
    if spec.schedule is not None:
        # Left out or given, the same number of passes is the same.
        passes = {"epochs_per_stage": spec.schedule.epochs}
        spec = spec.model_copy(update={"schedule": spec.schedule.model_copy(update=passes)})
    return spec.model_dump(
        mode="json",
        exclude={
            "training": {"checkpoint_interval_seconds", "prefix_cache"},
            "runtime": True,
            "storage": True,
            "retry": True,
            "suspend": True,
        },
    )


def _read(model: type[_Model], path: Path, what: str) -> _Model:
    """Return the file at `path` as `model`; a damaged one is a problem that names it."""
    try:
        return model.model_validate_json(path.read_bytes())
    except (ValidationError, OSError) as error:
        raise InvalidManifestError(
            [
                Problem(
                    path=str(path),
                    reason=ProblemReason.INVALID,
                    message=f"{what} cannot be read ({type(error).__name__}); move the run's "
                    "folder aside, or give the run another metadata.name",
                )
            ]
        ) from None


def _differences(before: object, now: object, path: str = "") -> list[tuple[str, object, object]]:
    """Return (path, before, now) of every leaf that differs."""
    if before == now:
        return []
    if isinstance(before, dict) and isinstance(now, dict):
        keys = [*before, *(key for key in now if key not in before)]
        return [
            difference
            for key in keys
            for difference in _differences(
                before.get(key), now.get(key), f"{path}.{key}" if path else key
            )
        ]
    return [(path, before, now)]


def read_plan(layout: RunLayout) -> Plan | None:
    """Return the plan that the run was begun with; None before there is one."""
    return _read(Plan, layout.plan, "the plan of the run") if layout.plan.exists() else None


def changed_inputs(plan: Plan, facts: Facts) -> list[Problem]:
    """Return a problem for model and data that are not those the plan was made for."""
    now = {"model": facts.model.digest, "dataset": facts.data.digest}
    planned = {"model": plan.model_digest, "dataset": plan.data_digest}
    return [
        Problem(
            path=f"spec.{name}.source",
            reason=ProblemReason.CONFLICT,
            message="holds something else than when the run was planned; put it back, or give the "
            "run another metadata.name",
        )
        for name in now
        if now[name] != planned[name]
    ]


def finished_report(layout: StageLayout, config: StageConfig) -> StageReport | None:
    """Return the report of `config`'s task if it has been done with the same input."""
    report = read_report(layout)
    try:
        earlier = StageConfig.model_validate_json(layout.config.read_bytes())
    except (OSError, ValidationError):
        return None
    same = _input_digest(earlier) == _input_digest(config)
    done = report is not None and report.outcome is Outcome.SUCCEEDED
    return report if same and done else None


def read_report(layout: StageLayout) -> StageReport | None:
    """Return the task's report; None where there is none, or none that can be read."""
    try:
        return StageReport.model_validate_json(layout.report.read_bytes())
    except (OSError, ValidationError):
        return None


def _input_digest(config: StageConfig) -> str:
    """Return the digest of all in a stage file that decides its result.

    Where things lie and how often to save does not; digests say what the folders hold.
    """
    places = {"run_directory", "models_directory", "manifest_directory", "model_directory"}
    if config.task is Task.PREPARE:
        # Relative sources count from there, and prepare is the one to read them.
        places.remove("manifest_directory")
    # Nor does how many processes it takes.
    data = config.model_dump(mode="json", exclude={"attempt", "chain", "engine", *places})
    del data["training"]["checkpointIntervalSeconds"]
    return digest_of_json({**data, "chain": [parent.digest for parent in config.chain]})
