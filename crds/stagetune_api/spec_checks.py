"""Rules over more than one field of a spec: what the models alone cannot see.

`rules` says the same as CEL, for the API server; a test holds the two together. What is trained and
how has a file of its own, `training_checks`.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from enum import StrEnum

from stagetune_api.engine_checks import check_engine, check_engine_plan
from stagetune_api.problems import Problem, ProblemReason, conflict, not_yet
from stagetune_api.spec import (
    ExportFormat,
    RetainPolicy,
    StagedFineTuneSpec,
    TaintEffect,
    TolerationOperator,
)
from stagetune_api.stage import plan_engine
from stagetune_api.training_checks import TRAINING_RULES, check_not_yet_supported
from stagetune_api.training_spec import MethodType

_CLAIM_SOURCE = r"[a-z0-9]([-a-z0-9.]*[a-z0-9])?(/(?!\.\.?(/|$))[^/]+)+/?"
"""What stands after pvc://: the name of a claim and a path on it that stays on it."""


def check_spec(spec: StagedFineTuneSpec) -> list[Problem]:
    """Return every problem that the models alone cannot see."""
    return [problem for rule in _RULES for problem in rule(spec)]


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
    replay = spec.protection.replay if spec.protection is not None else None
    if replay is not None and replay.source is not None:
        sources["spec.protection.replay.source"] = replay.source
    return sources


def num_gpus(spec: StagedFineTuneSpec) -> int:
    """Return the GPUs of a training pod, whoever made them."""
    resources = spec.runtime.resources if spec.runtime is not None else None
    limits = resources.limits if resources is not None else {}
    return sum(int(amount) for name, amount in limits.items() if name.endswith("/gpu"))


def _check_for_cluster(spec: StagedFineTuneSpec) -> Iterator[Problem]:
    for path, source in sources_of(spec).items():
        if source.startswith("file://"):
            yield conflict(
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
    runtime = spec.runtime
    by_gpus = plan_engine(runtime, num_gpus=num_gpus(spec))
    if by_gpus is not None and plan_engine(runtime) is None:
        # Several GPUs and nothing said of processes: the other rules could not know.
        yield from check_engine_plan(spec, by_gpus)
    if by_gpus is not None and 0 < num_gpus(spec) < by_gpus.processes_per_node:
        yield conflict(
            "spec.runtime.processesPerNode",
            f"{by_gpus.processes_per_node} processes need a GPU each, and resources.limits has "
            f"{num_gpus(spec)}; raise the limit or lower processesPerNode",
        )


def _check_for_local_run(spec: StagedFineTuneSpec) -> Iterator[Problem]:
    for path, source in sources_of(spec).items():
        if source.startswith("pvc://"):
            yield conflict(
                path, f"{source} is a claim on a cluster; use file://, hf:// or ms:// here"
            )
    if spec.runtime is not None and spec.runtime.nodes > 1:
        yield conflict(
            "spec.runtime.nodes",
            f"{spec.runtime.nodes} nodes are for runs on a cluster; a run on this machine has one; "
            "set it to 1",
        )
    if spec.suspend:
        yield conflict(
            "spec.suspend",
            "true stops runs on a cluster; a run on this machine is stopped by Ctrl-C, after which "
            "the same command goes on; set it to false",
        )


def _check_sources(spec: StagedFineTuneSpec) -> Iterator[Problem]:
    for path, source in sources_of(spec).items():
        scheme, _, rest = source.partition("://")
        if scheme == "s3":
            yield not_yet(path, "s3:// sources", "use hf://, ms://, pvc:// or file://")
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
            yield conflict(
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
        yield conflict("spec.storage.size", f"exactly one of size and claimName is needed; {given}")
    if storage.claim_name is None:
        return
    if storage.storage_class_name is not None:
        yield conflict(
            "spec.storage.storageClassName",
            f"the claim {storage.claim_name} is there already and has its class; remove it",
        )
    if storage.retain is RetainPolicy.NOTHING:
        yield conflict(
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
            yield conflict(f"{path}.value", "operator Exists compares no value; remove it")
        if not exists and toleration.key is None:
            yield conflict(f"{path}.key", "operator Equal needs a key; add it, or use Exists")
        if (
            toleration.toleration_seconds is not None
            and toleration.effect is not TaintEffect.NO_EXECUTE
        ):
            yield conflict(
                f"{path}.tolerationSeconds", "only effect NoExecute waits; remove it or set that"
            )


def _check_validation_rows(spec: StagedFineTuneSpec) -> Iterator[Problem]:
    validation = spec.dataset.validation
    if (validation.fraction is None) == (validation.source is None):
        given = "neither is given" if validation.source is None else "both are given"
        yield conflict(
            "spec.dataset.validation", f"exactly one of fraction and source is needed; {given}"
        )


def _check_export(spec: StagedFineTuneSpec) -> Iterator[Problem]:
    uses_lora = spec.method.type in (MethodType.LORA, MethodType.QLORA)
    if spec.export.format is ExportFormat.ADAPTER and not uses_lora:
        yield conflict(
            "spec.export.format",
            f"Adapter needs method.type LoRA or QLoRA, this is {spec.method.type}; use Merged",
        )


_RULES: Sequence[Callable[[StagedFineTuneSpec], Iterator[Problem]]] = (
    _check_sources,
    _check_validation_rows,
    *TRAINING_RULES,
    _check_export,
    _check_storage,
    _check_runtime,
    check_engine,
    check_not_yet_supported,
)
