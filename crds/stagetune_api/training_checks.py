"""Rules over more than one field of what is trained and how: method, stages, training, protection.

`rules` says the same as CEL; a test holds the two together. A part of `spec_checks`.
"""

from collections.abc import Callable, Iterator, Sequence

from pydantic.alias_generators import to_camel

from stagetune_api.problems import Problem, ProblemReason, conflict, not_yet
from stagetune_api.schedule_checks import check_schedule_options, check_stage_options
from stagetune_api.spec import ExportFormat, StagedFineTuneSpec
from stagetune_api.training_spec import (
    AdapterScope,
    ExplicitStageSpec,
    MethodSpec,
    MethodType,
)


def _check_schedule(spec: StagedFineTuneSpec) -> Iterator[Problem]:
    schedule = spec.schedule
    if schedule is None:
        return
    if spec.stages is not None:
        yield conflict("spec.schedule", "stages lists the stages already; remove one of the two")
    if schedule.layers_per_stage is not None and schedule.stage_count is not None:
        yield conflict(
            "spec.schedule.layersPerStage",
            f"{schedule.layers_per_stage} layers in each of {schedule.stage_count} stages says the "
            "same thing twice; remove layersPerStage or stageCount",
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
    yield from _check_adapters(method)
    if method.type is MethodType.FULL:
        return
    trained = "adapters stand only in decoder layers" if uses_lora else "only added blocks train"
    cure = f"{trained}; use method.type: Full or leave it out"
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


def _check_adapters(method: MethodSpec) -> Iterator[Problem]:
    lora = method.lora
    if lora is not None and lora.dora and lora.adapters is AdapterScope.PER_STAGE:
        yield conflict(
            "spec.method.lora.adapters",
            "PerStage with dora: each adapter would rescale the whole weight, so those of several "
            "stages do not add up; use Shared or leave dora out",
        )


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
            "1e-4 to 1e-3 for LoRA; Expand begins well at 1e-4",
        )
    if training.batch_size % training.micro_batch_size:
        yield conflict(
            "spec.training.microBatchSize",
            f"{training.micro_batch_size} does not divide batchSize {training.batch_size}; "
            "use a divisor",
        )
    if training.packing and training.group_by_length:
        yield conflict(
            "spec.training.groupByLength",
            "packing leaves no padding that batches of rows of like length would save; remove one "
            "of the two",
        )


def _check_optimizer_in_backward(spec: StagedFineTuneSpec) -> Iterator[Problem]:
    training = spec.training
    if not training.optimizer_in_backward:
        return
    sizes = {"spec.training": (training.batch_size, training.micro_batch_size)}
    if spec.stages is not None:
        sizes = {
            f"spec.stages[{index}]": (
                stage.batch_size or training.batch_size,
                stage.micro_batch_size or training.micro_batch_size,
            )
            for index, stage in enumerate(spec.stages)
        }
    for path, (batch_size, micro_batch_size) in sizes.items():
        if batch_size != micro_batch_size:
            yield conflict(
                "spec.training.optimizerInBackward",
                f"a batch is one micro-batch with it, and that of {path} has {batch_size} rows in "
                f"micro-batches of {micro_batch_size}; make both sizes equal, or leave "
                "optimizerInBackward out",
            )


def _check_weights_at_export(spec: StagedFineTuneSpec) -> Iterator[Problem]:
    """Refuse averaging and depthScaling where there is no base weight, or no line to it."""
    lora = spec.method.lora
    dora = lora is not None and lora.dora and spec.method.type is not MethodType.EXPAND
    for name in ("averaging", "depth_scaling"):
        if spec.protection is None or getattr(spec.protection, name) is None:
            continue
        path = f"spec.protection.{to_camel(name)}"
        if spec.method.type is MethodType.EXPAND:
            yield conflict(
                path,
                "method.type Expand adds blocks, and the base has no weights to average them with; "
                "leave it out",
            )
        if dora and spec.export.format is ExportFormat.ADAPTER:
            yield conflict(
                path,
                "the weights that a DoRA adapter gives do not lie on a line to the base's, so no "
                "adapter holds their average; use export.format: Merged or leave it out",
            )


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


def check_not_yet_supported(spec: StagedFineTuneSpec) -> Iterator[Problem]:
    """Refuse what the API already names and no program does yet: nothing is silently ignored."""
    if spec.serve is not None:
        yield not_yet("spec.serve", "servers", "remove serve")


TRAINING_RULES: Sequence[Callable[[StagedFineTuneSpec], Iterator[Problem]]] = (
    _check_schedule,
    check_schedule_options,
    _check_explicit_stages,
    check_stage_options,
    _check_method,
    _check_training,
    _check_optimizer_in_backward,
    _check_weights_at_export,
    _check_replay,
    _check_anchor,
)
"""Each gives the problems of its kind."""
