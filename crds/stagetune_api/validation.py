"""From a parsed YAML document to a manifest, or to everything that is wrong with it."""

import copy
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from enum import StrEnum
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails, to_json

from stagetune_api.problems import Problem, ProblemReason, format_path
from stagetune_api.spec import (
    DataPartition,
    EngineType,
    ExplicitStageSpec,
    ExportFormat,
    MethodType,
    OptimizerType,
    Order,
    PrefixCache,
    RetainPolicy,
    StagedFineTune,
    StagedFineTuneSpec,
    TaintEffect,
    TolerationOperator,
)

_CLAIM_SOURCE = r"[a-z0-9]([-a-z0-9.]*[a-z0-9])?(/(?!\.\.?(/|$))[^/]+)+/?"
"""What stands after pvc://: the name of a claim and a path on it that stays on it."""
_RESOURCES = ("spec", "runtime", "resources")
"""Where the manifest has quantities: below `limits` and `requests`, by name."""


def parse_manifest(document: Mapping[str, Any]) -> StagedFineTune | list[Problem]:
    """Return the manifest, or every problem that it has; `status` of a live object is left out."""
    body = {key: value for key, value in document.items() if key != "status"}
    try:
        manifest = _parse_strictly(body)
    except ValidationError as error:
        errors = _with_whole_quantities(error.errors())
        problems = [_schema_problem(details) for details in errors]
        return [*problems, *_problems_beside(body, errors, problems)]
    return check_spec(manifest.spec) or manifest


def _parse_strictly(body: Mapping[str, Any]) -> StagedFineTune:
    """Return the manifest with the names and the types that the API server takes.

    pydantic reads Python values leniently ("16" as a number, 1 as true) and has no way to be strict
    about them and yet take an enum's value for the enum; about JSON it has.
    """
    text = to_json(body, inf_nan_mode="constants", fallback=str)
    return StagedFineTune.model_validate_json(text, strict=True, by_name=False)


def _with_whole_quantities(errors: Sequence[ErrorDetails]) -> list[ErrorDetails]:
    """Return `errors` with one for each quantity instead of one for each form that it has not."""
    joined: dict[tuple[str | int, ...], ErrorDetails] = {}
    for details in errors:
        place = details["loc"]
        if place[:3] == _RESOURCES and place[5:] in (("constrained-int",), ("constrained-str",)):
            details = ErrorDetails(
                type="quantity",
                loc=place[:5],
                msg="should be an amount as Kubernetes writes it: 1, '500m', '48Gi'",
                input=details["input"],
            )
        joined.setdefault(details["loc"], details)
    return list(joined.values())


def _problems_beside(
    body: Mapping[str, Any], errors: Sequence[ErrorDetails], known: Sequence[Problem]
) -> list[Problem]:
    """Return what is wrong apart from values of a wrong type, so that one round shows everything.

    The refused values are taken out and the rest is checked. What that check says of the places
    where something was taken out is left away: it may be true of the rest only.
    """
    rest = copy.deepcopy(dict(body))
    for details in errors:
        _remove(rest, [part for part in details["loc"] if part != "[key]"])
    try:
        manifest = _parse_strictly(rest)
    except ValidationError:
        return []
    touched = {
        problem.path.rpartition(".")[0]
        for problem in known
        if problem.reason is not ProblemReason.UNKNOWN_FIELD
    }
    return [
        problem
        for problem in check_spec(manifest.spec)
        if problem.path not in touched and problem.path.rpartition(".")[0] not in touched
    ]


def _remove(value: Any, location: Sequence[str | int]) -> None:
    """Take what stands at `location` out of `value`, a tree of dicts and lists."""
    for part in location[:-1]:
        if not isinstance(value, (dict, list)):
            return
        try:
            value = value[part]  # type: ignore[index]  # the parts come from the tree itself
        except (KeyError, IndexError, TypeError):
            return
    if isinstance(value, dict):
        value.pop(location[-1], None)


def check_spec(spec: StagedFineTuneSpec) -> list[Problem]:
    """Return every problem that the models alone cannot see."""
    rules: Sequence[Callable[[StagedFineTuneSpec], Iterator[Problem]]] = (
        _check_sources,
        _check_validation_rows,
        _check_schedule,
        _check_explicit_stages,
        _check_method,
        _check_training,
        _check_export,
        _check_storage,
        _check_runtime,
        _check_not_yet_supported,
    )
    return [problem for rule in rules for problem in rule(spec)]


def _schema_problem(details: ErrorDetails) -> Problem:
    """Return pydantic's error in our words: the path, the value, and what is expected."""
    path = format_path([part for part in details["loc"] if not _is_model_tag(part)])
    match details["type"]:
        case "extra_forbidden":
            return Problem(
                path=path,
                reason=ProblemReason.UNKNOWN_FIELD,
                message="there is no such field; check its spelling and its place",
            )
        case "missing":
            return Problem(
                path=path, reason=ProblemReason.REQUIRED, message="this field is required; add it"
            )
        case "string_pattern_mismatch" if path.endswith("source"):
            message = (
                f"{_shown(details['input'])} is not a source; write hf://org/name, "
                "ms://org/name, pvc://claim/path or file://path"
            )
            return Problem(path=path, reason=ProblemReason.INVALID, message=message)
        case _:
            expected = re.sub(r"^(Value error, |Input |String )", "", details["msg"])
            message = f"{_shown(details['input'])} is refused: it {expected}"
            return Problem(path=path, reason=ProblemReason.INVALID, message=message)


def _is_model_tag(part: str | int) -> bool:
    """Whether pydantic put `part` into a path to name a type rather than a place."""
    return isinstance(part, str) and ("[" in part or "(" in part)


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 120 else text[:117] + "..."


def _conflict(path: str, message: str) -> Problem:
    return Problem(path=path, reason=ProblemReason.CONFLICT, message=message)


class Runner(StrEnum):
    """What runs a manifest."""

    CLUSTER = "Cluster"
    LOCAL = "Local"


def check_runner(spec: StagedFineTuneSpec, runner: Runner) -> list[Problem]:
    """Return what keeps a valid spec from being run by `runner`."""
    check = _check_for_cluster if runner is Runner.CLUSTER else _check_for_local_run
    return list(check(spec))


def sources_of(spec: StagedFineTuneSpec) -> dict[str, str]:
    """Return every source that a run reads, by its path in the manifest."""
    sources = {"spec.model.source": spec.model.source, "spec.dataset.source": spec.dataset.source}
    if spec.dataset.validation.source is not None:
        sources["spec.dataset.validation.source"] = spec.dataset.validation.source
    if spec.evaluation.general_text is not None:
        sources["spec.evaluation.generalText.source"] = spec.evaluation.general_text.source
    return sources


def _check_for_cluster(spec: StagedFineTuneSpec) -> Iterator[Problem]:
    for path, source in sources_of(spec).items():
        if source.startswith("file://"):
            yield _conflict(
                path,
                f"{source} is a path on one machine, which no pod sees; put the files on a claim "
                "and write pvc://claim/path, or use hf:// or ms://",
            )
    if spec.storage is None:
        yield Problem(
            path="spec.storage",
            reason=ProblemReason.REQUIRED,
            message="a run on a cluster keeps its files on a volume; give storage.size for a new "
            "claim or storage.claimName for one that is there",
        )


def _check_for_local_run(spec: StagedFineTuneSpec) -> Iterator[Problem]:
    for path, source in sources_of(spec).items():
        if source.startswith("pvc://"):
            yield _conflict(
                path, f"{source} is a claim on a cluster; use file://, hf:// or ms:// here"
            )
    if spec.suspend:
        yield _conflict(
            "spec.suspend",
            "true stops runs on a cluster; a run on this machine is stopped by Ctrl-C, after which "
            "the same command goes on; set it to false",
        )


def _check_sources(spec: StagedFineTuneSpec) -> Iterator[Problem]:
    for path, source in sources_of(spec).items():
        scheme, _, rest = source.partition("://")
        if scheme == "s3":
            yield _not_yet(path, "s3:// sources", "use hf://, ms://, pvc:// or file://")
        if scheme == "pvc" and not re.fullmatch(_CLAIM_SOURCE, rest):
            yield Problem(
                path=path,
                reason=ProblemReason.INVALID,
                message=f"{source} does not name a claim and a path on it; write pvc://claim/path, "
                "without '..'",
            )
    revisions = (
        ("spec.model", spec.model.source, spec.model.revision),
        ("spec.dataset", spec.dataset.source, spec.dataset.revision),
    )
    for path, source, revision in revisions:
        if revision is not None and not source.startswith(("hf://", "ms://", "s3://")):
            yield _conflict(
                f"{path}.revision",
                f"{revision!r} has no meaning for {source}: only hf:// and ms:// have revisions; "
                "remove it",
            )


def _check_storage(spec: StagedFineTuneSpec) -> Iterator[Problem]:
    storage = spec.storage
    if storage is None:
        return
    if (storage.size is None) == (storage.claim_name is None):
        given = "neither is given" if storage.size is None else "both are given"
        yield _conflict(
            "spec.storage.size", f"exactly one of size and claimName is needed; {given}"
        )
    if storage.claim_name is None:
        return
    if storage.storage_class_name is not None:
        yield _conflict(
            "spec.storage.storageClassName",
            f"the claim {storage.claim_name} is there already and has its class; remove it",
        )
    if storage.retain is RetainPolicy.NOTHING:
        yield _conflict(
            "spec.storage.retain",
            f"Nothing deletes the claim that was made for the run, and {storage.claim_name} was "
            "not; use Result or Everything",
        )


def _check_runtime(spec: StagedFineTuneSpec) -> Iterator[Problem]:
    resources = spec.runtime.resources if spec.runtime else None
    for kind, amounts in (
        ("limits", resources.limits if resources else {}),
        ("requests", resources.requests if resources else {}),
    ):
        for name, amount in amounts.items():
            if "/" in name and not str(amount).isdecimal():
                yield Problem(
                    path=f"spec.runtime.resources.{kind}.{name}",
                    reason=ProblemReason.INVALID,
                    message=f"{amount!r} is no whole number: extended resources such as {name} are "
                    "only given out whole; give a whole number",
                )
    for index, toleration in enumerate(spec.runtime.tolerations or [] if spec.runtime else []):
        path = f"spec.runtime.tolerations[{index}]"
        exists = toleration.operator is TolerationOperator.EXISTS
        if exists and toleration.value is not None:
            yield _conflict(f"{path}.value", "operator Exists compares no value; remove it")
        if not exists and toleration.key is None:
            yield _conflict(f"{path}.key", "operator Equal needs a key; add it, or use Exists")
        if (
            toleration.toleration_seconds is not None
            and toleration.effect is not TaintEffect.NO_EXECUTE
        ):
            yield _conflict(
                f"{path}.tolerationSeconds", "only effect NoExecute waits; remove it or set that"
            )


def _check_validation_rows(spec: StagedFineTuneSpec) -> Iterator[Problem]:
    validation = spec.dataset.validation
    if (validation.fraction is None) == (validation.source is None):
        given = "neither is given" if validation.source is None else "both are given"
        yield _conflict(
            "spec.dataset.validation", f"exactly one of fraction and source is needed; {given}"
        )


def _check_schedule(spec: StagedFineTuneSpec) -> Iterator[Problem]:
    if (spec.schedule is None) == (spec.stages is None):
        given = "neither is given" if spec.stages is None else "both are given"
        yield _conflict("spec.schedule", f"exactly one of schedule and stages is needed; {given}")
    schedule = spec.schedule
    if schedule is None:
        return
    if (schedule.layers_per_stage is None) == (schedule.stage_count is None):
        given = "neither is given" if schedule.stage_count is None else "both are given"
        yield _conflict(
            "spec.schedule.layersPerStage",
            f"exactly one of layersPerStage and stageCount is needed; {given}",
        )
    if (
        schedule.data_partition is DataPartition.DISJOINT
        and schedule.data_fraction is not None
        and schedule.stage_count is not None
        and schedule.data_fraction * schedule.stage_count > 1 + 1e-9
    ):
        yield _conflict(
            "spec.schedule.dataFraction",
            f"{schedule.data_fraction} of the rows for each of {schedule.stage_count} disjoint "
            f"stages is more than there is; use at most {1 / schedule.stage_count:.4f} or "
            "dataPartition: Shared",
        )


def _check_explicit_stages(spec: StagedFineTuneSpec) -> Iterator[Problem]:
    seen: set[str] = set()
    for index, stage in enumerate(spec.stages or []):
        path = f"spec.stages[{index}]"
        if stage.name in seen:
            yield _conflict(f"{path}.name", f"{stage.name!r} is used twice; names must differ")
        seen.add(stage.name)
        yield from _check_explicit_stage(path, stage)
        if stage.learning_rate is not None and spec.training.learning_rate_by_depth is not None:
            yield _conflict(
                f"{path}.learningRate",
                "spec.training.learningRateByDepth already gives this stage a rate; keep one",
            )


def _check_explicit_stage(path: str, stage: ExplicitStageSpec) -> Iterator[Problem]:
    layers = stage.layers
    if layers.last < layers.first:
        yield _conflict(
            f"{path}.layers",
            f"last ({layers.last}) is below first ({layers.first}); both ends belong to the range",
        )
    if stage.embeddings and layers.first != 0:
        yield _conflict(
            f"{path}.embeddings",
            f"the embeddings train with layer 0, this stage begins at layer {layers.first}",
        )


def _check_method(spec: StagedFineTuneSpec) -> Iterator[Problem]:
    method = spec.method
    uses_lora = method.type in (MethodType.LORA, MethodType.QLORA)
    if method.lora is not None and not uses_lora:
        yield _conflict(
            "spec.method.lora", f"method.type is {method.type}; set it to LoRA or remove lora"
        )
    if method.expand is not None and method.type is not MethodType.EXPAND:
        yield _conflict(
            "spec.method.expand", f"method.type is {method.type}; set it to Expand or remove expand"
        )
    if not uses_lora:
        return
    cure = "adapters stand only in decoder layers; use method.type: Full or leave it out"
    if spec.schedule is not None and spec.schedule.head.value != "Never":
        yield _conflict("spec.schedule.head", f"{spec.schedule.head} with {method.type}: {cure}")
    if spec.schedule is not None and spec.schedule.embeddings.value != "Never":
        yield _conflict(
            "spec.schedule.embeddings", f"{spec.schedule.embeddings} with {method.type}: {cure}"
        )
    for index, stage in enumerate(spec.stages or []):
        for field in ("head", "embeddings"):
            if getattr(stage, field):
                yield _conflict(f"spec.stages[{index}].{field}", f"true with {method.type}: {cure}")


def _check_training(spec: StagedFineTuneSpec) -> Iterator[Problem]:
    training = spec.training
    own_rates = [stage.learning_rate is not None for stage in spec.stages or []]
    by_stage = bool(own_rates) and all(own_rates)
    given = [training.learning_rate is not None, training.learning_rate_by_depth is not None]
    if all(given):
        yield _conflict(
            "spec.training.learningRate", "learningRateByDepth is given too; keep one of them"
        )
    if not any(given) and not by_stage:
        yield Problem(
            path="spec.training.learningRate",
            reason=ProblemReason.REQUIRED,
            message="give learningRate or learningRateByDepth; 2e-5 to 1e-4 is usual for Full and "
            "1e-4 to 1e-3 for LoRA",
        )
    if training.batch_size % training.micro_batch_size:
        yield _conflict(
            "spec.training.microBatchSize",
            f"{training.micro_batch_size} does not divide batchSize {training.batch_size}; "
            "use a divisor",
        )


def _check_export(spec: StagedFineTuneSpec) -> Iterator[Problem]:
    uses_lora = spec.method.type in (MethodType.LORA, MethodType.QLORA)
    if spec.export.format is ExportFormat.ADAPTER and not uses_lora:
        yield _conflict(
            "spec.export.format",
            f"Adapter needs method.type LoRA or QLoRA, this is {spec.method.type}; use Merged",
        )


def _not_yet(path: str, what: str, cure: str) -> Problem:
    return Problem(
        path=path,
        reason=ProblemReason.NOT_YET_SUPPORTED,
        message=f"{what} are not yet supported in this version; {cure}",
    )


def _check_not_yet_supported(spec: StagedFineTuneSpec) -> Iterator[Problem]:
    """Refuse what the API already names and no program does yet: nothing is silently ignored."""
    if spec.method.type in (MethodType.QLORA, MethodType.EXPAND):
        yield _not_yet("spec.method.type", f"{spec.method.type} stages", "use Full or LoRA")
    if spec.schedule is not None and spec.schedule.order is Order.GRADIENT_NORM:
        yield _not_yet(
            "spec.schedule.order", "schedules by GradientNorm", "use BottomUp or TopDown"
        )
    if spec.training.optimizer is OptimizerType.ADAMW_8BIT:
        yield _not_yet("spec.training.optimizer", "8-bit optimizer states", "use AdamW")
    if spec.training.prefix_cache is not PrefixCache.NEVER:
        yield _not_yet("spec.training.prefixCache", "prefix caches", "use Never or leave it out")
    sections = {
        "protection": (spec.protection, "protection methods"),
        "serve": (spec.serve, "servers"),
    }
    for name, (section, what) in sections.items():
        if section is not None:
            yield _not_yet(f"spec.{name}", what, f"remove {name}")
    if spec.runtime is not None and spec.runtime.engine is EngineType.DEEPSPEED:
        yield _not_yet("spec.runtime.engine", "DeepSpeed engines", "use Auto or Single")
