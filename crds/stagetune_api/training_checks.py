"""Rules over more than one field of what is trained and how: method, stages, training, protection.

`rules` says the same as CEL; a test holds the two together. A part of `spec_checks`.
"""

from collections.abc import Callable, Iterator, Sequence

from pydantic.alias_generators import to_camel

from stagetune_api.problems import Problem, ProblemReason, conflict, not_yet
from stagetune_api.spec import (
    DataPartition,
    EngineType,
    ExplicitStageSpec,
    LoraSpec,
    MethodType,
    OptimizerType,
    Order,
    PrefixCache,
    ScheduleSpec,
    StagedFineTuneSpec,
)


def _check_schedule(spec: StagedFineTuneSpec) -> Iterator[Problem]:
    if (spec.schedule is None) == (spec.stages is None):
        given = "neither is given" if spec.stages is None else "both are given"
        yield conflict("spec.schedule", f"exactly one of schedule and stages is needed; {given}")
    schedule = spec.schedule
    if schedule is None:
        return
    if (schedule.layers_per_stage is None) == (schedule.stage_count is None):
        given = "neither is given" if schedule.stage_count is None else "both are given"
        yield conflict(
            "spec.schedule.layersPerStage",
            f"exactly one of layersPerStage and stageCount is needed; {given}",
        )
    if (
        schedule.data_partition is DataPartition.DISJOINT
        and schedule.data_fraction is not None
        and schedule.stage_count is not None
        and schedule.data_fraction * schedule.stage_count > 1 + 1e-9
    ):
        yield conflict(
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
            yield conflict(f"{path}.name", f"{stage.name!r} is used twice; names must differ")
        seen.add(stage.name)
        yield from _check_explicit_stage(path, stage)
        if stage.learning_rate is not None and spec.training.learning_rate_by_depth is not None:
            yield conflict(
                f"{path}.learningRate",
                "spec.training.learningRateByDepth already gives this stage a rate; keep one",
            )


def _check_explicit_stage(path: str, stage: ExplicitStageSpec) -> Iterator[Problem]:
    layers = stage.layers
    if layers.last < layers.first:
        yield conflict(
            f"{path}.layers",
            f"last ({layers.last}) is below first ({layers.first}); both ends belong to the range",
        )
    if stage.embeddings and layers.first != 0:
        yield conflict(
            f"{path}.embeddings",
            f"the embeddings train with layer 0, this stage begins at layer {layers.first}",
        )


def _check_method(spec: StagedFineTuneSpec) -> Iterator[Problem]:
    method = spec.method
    uses_lora = method.type in (MethodType.LORA, MethodType.QLORA)
    if method.lora is not None and not uses_lora:
        yield conflict(
            "spec.method.lora", f"method.type is {method.type}; set it to LoRA or remove lora"
        )
    if method.expand is not None and method.type is not MethodType.EXPAND:
        yield conflict(
            "spec.method.expand", f"method.type is {method.type}; set it to Expand or remove expand"
        )
    if not uses_lora:
        return
    cure = "adapters stand only in decoder layers; use method.type: Full or leave it out"
    if spec.schedule is not None and spec.schedule.head.value != "Never":
        yield conflict("spec.schedule.head", f"{spec.schedule.head} with {method.type}: {cure}")
    if spec.schedule is not None and spec.schedule.embeddings.value != "Never":
        yield conflict(
            "spec.schedule.embeddings", f"{spec.schedule.embeddings} with {method.type}: {cure}"
        )
    for index, stage in enumerate(spec.stages or []):
        for field in ("head", "embeddings"):
            if getattr(stage, field):
                yield conflict(f"spec.stages[{index}].{field}", f"true with {method.type}: {cure}")


def _check_training(spec: StagedFineTuneSpec) -> Iterator[Problem]:
    training = spec.training
    own_rates = [stage.learning_rate is not None for stage in spec.stages or []]
    by_stage = bool(own_rates) and all(own_rates)
    given = [training.learning_rate is not None, training.learning_rate_by_depth is not None]
    if all(given):
        yield conflict(
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
        yield conflict(
            "spec.training.microBatchSize",
            f"{training.micro_batch_size} does not divide batchSize {training.batch_size}; "
            "use a divisor",
        )


def check_not_yet_supported(spec: StagedFineTuneSpec) -> Iterator[Problem]:
    """Refuse what the API already names and no program does yet: nothing is silently ignored."""
    yield from _methods_not_yet(spec)
    yield from _schedules_not_yet(spec)
    yield from _optimizers_not_yet(spec)
    yield from _protection_not_yet(spec)
    if spec.training.prefix_cache is not PrefixCache.NEVER:
        yield not_yet("spec.training.prefixCache", "prefix caches", "use Never or leave it out")
    if spec.serve is not None:
        yield not_yet("spec.serve", "servers", "remove serve")
    if spec.runtime is not None and spec.runtime.engine is EngineType.DEEPSPEED:
        yield not_yet("spec.runtime.engine", "DeepSpeed engines", "use Auto or Single")


def _methods_not_yet(spec: StagedFineTuneSpec) -> Iterator[Problem]:
    if spec.method.type in (MethodType.QLORA, MethodType.EXPAND):
        yield not_yet("spec.method.type", f"{spec.method.type} stages", "use Full or LoRA")
    lora = spec.method.lora or LoraSpec()
    for field, default in (("rankStabilized", False), ("dora", False), ("adapters", "Shared")):
        value = {"rankStabilized": lora.rank_stabilized, "dora": lora.dora}.get(
            field, lora.adapters.value
        )
        if value != default:
            yield not_yet(f"spec.method.lora.{field}", f"{field} adapters", "leave it out")


def _schedules_not_yet(spec: StagedFineTuneSpec) -> Iterator[Problem]:
    schedule = spec.schedule
    if schedule is not None and schedule.order is Order.GRADIENT_NORM:
        yield not_yet("spec.schedule.order", "schedules by GradientNorm", "use BottomUp or TopDown")
    new = ("open_top", "cumulative", "overlap", "passes", "gradient_norm")
    for field in new if schedule is not None else ():
        if getattr(schedule, field) != ScheduleSpec.model_fields[field].default:
            alias = to_camel(field)
            yield not_yet(f"spec.schedule.{alias}", f"schedules with {alias}", "leave it out")
    for index, stage in enumerate(spec.stages or []):
        for field in ("data_offset", "open_top", "batch_size", "micro_batch_size", "rank"):
            if getattr(stage, field) != ExplicitStageSpec.model_fields[field].default:
                alias = to_camel(field)
                path = f"spec.stages[{index}].{alias}"
                yield not_yet(path, f"stages with {alias}", "leave it out")


def _optimizers_not_yet(spec: StagedFineTuneSpec) -> Iterator[Problem]:
    training = spec.training
    if training.optimizer is OptimizerType.ADAMW_8BIT:
        yield not_yet("spec.training.optimizer", "8-bit optimizer states", "use AdamW")
    if training.optimizer_in_backward:
        path = "spec.training.optimizerInBackward"
        yield not_yet(path, "optimizers in the backward pass", "leave it out")
    if training.early_stopping and training.early_stopping.min_gain_per_minute is not None:
        path = "spec.training.earlyStopping.minGainPerMinute"
        yield not_yet(path, "bounds on the gain for each minute", "leave it out")


def _check_replay(spec: StagedFineTuneSpec) -> Iterator[Problem]:
    replay = spec.protection.replay if spec.protection is not None else None
    if replay is None:
        return
    path = "spec.protection.replay"
    if (replay.source is None) == (replay.generated is None):
        given = "neither is given" if replay.source is None else "both are given"
        yield conflict(path, f"exactly one of source and generated is needed; {given}")
    general = spec.evaluation.general_text
    if general is not None and replay.source == general.source:
        yield conflict(
            f"{path}.source",
            f"{replay.source} is evaluation.generalText.source too: text that is trained on "
            "measures no forgetting; give one of the two another source",
        )
    if spec.training.optimizer_in_backward:
        yield conflict(
            path,
            "replayed rows are micro-batches of their own and training.optimizerInBackward makes "
            "a batch one micro-batch; remove one of the two",
        )


def _check_anchor(spec: StagedFineTuneSpec) -> Iterator[Problem]:
    anchor = spec.protection.anchor if spec.protection is not None else None
    if anchor is not None and spec.method.type is MethodType.EXPAND:
        yield conflict(
            "spec.protection.anchor",
            "method.type is Expand, whose layers are not all the base model's; use distillation or "
            "remove anchor",
        )


def _protection_not_yet(spec: StagedFineTuneSpec) -> Iterator[Problem]:
    for name in ("averaging", "depth_scaling"):
        if spec.protection is not None and getattr(spec.protection, name) is not None:
            path = f"spec.protection.{to_camel(name)}"
            yield not_yet(path, f"{to_camel(name)} methods", "leave it out")


TRAINING_RULES: Sequence[Callable[[StagedFineTuneSpec], Iterator[Problem]]] = (
    _check_schedule,
    _check_explicit_stages,
    _check_method,
    _check_training,
    _check_replay,
    _check_anchor,
)
"""Each gives the problems of its kind."""
