"""What keeps a valid spec from being planned for this model, this data and this device.

Each function gives all the problems of its kind; `plan` shows them together.
"""

from collections.abc import Iterator, Sequence

from stagetune_api.expansion import block_indices
from stagetune_api.facts import DataFacts, Facts, ModelFacts
from stagetune_api.problems import Problem, ProblemReason
from stagetune_api.spec import StagedFineTuneSpec
from stagetune_api.stage import PlannedStage, training_of_stage
from stagetune_api.training_spec import DataPartition, ExpandSpec, GradientCheckpointing, MethodType
from stagetune_operator.estimate import Machine
from stagetune_operator.schedule import Draft, deal_rows
from stagetune_operator.schedule_checks import find_schedule_problems
from stagetune_operator.stage_scope import is_target

_GIB = 2**30


def find_problems(spec: StagedFineTuneSpec, facts: Facts, drafts: Sequence[Draft]) -> list[Problem]:
    """Return everything about `spec` that does not agree with the facts."""
    return [
        *_layer_problems(spec, facts.model),
        *find_schedule_problems(spec, facts.model, drafts),
        *_head_problems(facts.model, drafts),
        *_target_problems(spec, facts.model),
        *_block_problems(spec, facts.model, drafts),
        *_data_problems(facts.data),
        *_partition_problems(spec, drafts),
        *_share_problems(spec, drafts, facts.data.train_rows),
    ]


def _problem(path: str, reason: ProblemReason, message: str) -> Problem:
    return Problem(path=path, reason=reason, message=message)


def _layer_problems(spec: StagedFineTuneSpec, model: ModelFacts) -> Iterator[Problem]:
    layers = model.num_layers
    there = f"the model has {layers} layers"
    for index, stage in enumerate(spec.stages or []):
        if stage.layers.last >= layers:
            yield _problem(
                f"spec.stages[{index}].layers.last",
                ProblemReason.INVALID,
                f"{stage.layers.last} is no layer: {there}, counted from 0; use at most "
                f"{layers - 1}",
            )


def _head_problems(model: ModelFacts, drafts: Sequence[Draft]) -> Iterator[Problem]:
    for draft in drafts:
        if not draft.head:
            continue
        scheduled = draft.path == "spec.schedule"
        value, cure = ("LastStage", "Never") if scheduled else ("true", "false")
        if model.tied_embeddings:
            yield _problem(
                f"{draft.path}.head",
                ProblemReason.CONFLICT,
                f"{value} is not possible: the head of this {model.model_type} model shares its "
                "matrix with the embeddings, so training it would change the input of every layer "
                f"below; use head: {cure}",
            )
        if model.num_layers - 1 not in draft.opened:
            yield _problem(
                f"{draft.path}.head",
                ProblemReason.CONFLICT,
                f"{value} is not possible: the head trains with the topmost layer, "
                f"{model.num_layers - 1}, and this stage ends at layer {draft.layers.last}; "
                f"use head: {cure} or end the stage at layer {model.num_layers - 1}",
            )


def _target_problems(spec: StagedFineTuneSpec, model: ModelFacts) -> Iterator[Problem]:
    lora = spec.method.lora
    modules = sorted(model.layer.linear_shapes)
    for index, target in enumerate((lora.target_modules if lora else None) or []):
        if not any(is_target(module, target) for module in modules):
            names = ", ".join(sorted({module.rpartition(".")[2] for module in modules}))
            yield _problem(
                f"spec.method.lora.targetModules[{index}]",
                ProblemReason.NOT_FOUND,
                f"{target!r} is no linear module of a {model.model_type} layer; use one of {names}",
            )


def _block_problems(
    spec: StagedFineTuneSpec, model: ModelFacts, drafts: Sequence[Draft]
) -> Iterator[Problem]:
    """Yield what leaves a stage of method Expand without a block to train."""
    if spec.method.type is not MethodType.EXPAND:
        return
    size = (spec.method.expand or ExpandSpec()).layers_per_block
    if size > model.num_layers:
        yield _problem(
            "spec.method.expand.layersPerBlock",
            ProblemReason.INVALID,
            f"{size} adds no block to {model.num_layers} layers; use at most {model.num_layers}",
        )
        return
    for draft in drafts:
        if not block_indices(draft.layers, size):
            place = "layersPerStage" if draft.path == "spec.schedule" else "layers"
            schedule = spec.schedule_in_use
            if schedule is not None and schedule.count is not None:
                place = "stageCount"
            yield _problem(
                f"{draft.path}.{place}",
                ProblemReason.CONFLICT,
                f"stage {draft.name} has no block to train: one is added behind every {size} "
                f"layers, the last of them behind layer {model.num_layers // size * size - 1}; "
                "open such a layer in every stage, or lower spec.method.expand.layersPerBlock",
            )


def _data_problems(data: DataFacts) -> Iterator[Problem]:
    if data.train_rows == 0:
        yield _problem(
            "spec.dataset.source",
            ProblemReason.INVALID,
            "no training row is left after preparation; the data report says what was dropped and "
            "why",
        )
    elif data.train_answer_tokens == 0:
        yield _problem(
            "spec.dataset.source",
            ProblemReason.INVALID,
            f"the {data.train_rows} training rows hold no token of an answer, so there is nothing "
            "to learn; look at spec.dataset.columns and at the answers' text",
        )
    if data.validation_rows == 0:
        yield _problem(
            "spec.dataset.validation",
            ProblemReason.INVALID,
            f"no validation row is left beside {data.train_rows} training rows; use a larger "
            "fraction or a source with rows",
        )


def _partition_problems(spec: StagedFineTuneSpec, drafts: Sequence[Draft]) -> Iterator[Problem]:
    schedule = spec.schedule_in_use
    if schedule is None or schedule.data_partition is not DataPartition.DISJOINT:
        return
    fraction = schedule.data_fraction
    if fraction is not None and fraction * len(drafts) > 1 + 1e-9:
        yield _problem(
            "spec.schedule.dataFraction",
            ProblemReason.CONFLICT,
            f"{fraction} of the rows for each of {len(drafts)} disjoint stages is more than there "
            f"is; use at most {int(1e4 / len(drafts)) / 1e4}, leave it out, or use dataPartition: "
            "Shared",
        )


def _share_problems(
    spec: StagedFineTuneSpec, drafts: Sequence[Draft], train_rows: int
) -> Iterator[Problem]:
    """Yield one problem for each place of the spec that leaves a stage without rows."""
    if train_rows == 0:
        return
    schedule = spec.schedule_in_use
    disjoint = schedule is not None and schedule.data_partition is DataPartition.DISJOINT
    equal_shares = disjoint and schedule is not None and schedule.data_fraction is None
    cure = "use fewer stages, more rows or dataPartition: Shared"
    if not disjoint:
        cure = "use a larger fraction or more rows"
    seen: set[str] = set()
    for draft, (start, end) in zip(drafts, deal_rows(spec, drafts, train_rows), strict=True):
        path = f"{draft.path}.{'dataPartition' if equal_shares else 'dataFraction'}"
        if end > start or path in seen:
            continue
        seen.add(path)
        yield _problem(
            path,
            ProblemReason.INVALID,
            f"{draft.data_fraction:.6g} of {train_rows} training rows leaves stage {draft.name} "
            f"without a row; {cure}",
        )


def find_memory_problems(
    spec: StagedFineTuneSpec, machine: Machine, stages: Sequence[PlannedStage]
) -> list[Problem]:
    """Return a problem where a stage is larger than the device, with the numbers of the largest."""
    largest = max(stages, key=lambda stage: stage.estimate.memory_bytes)
    estimate, available = largest.estimate, machine.memory_bytes
    if available is None or estimate.memory_bytes <= available:
        return []
    parts = {
        "weights": estimate.weights_bytes,
        "training state": estimate.training_state_bytes,
        "activations": estimate.activation_bytes,
        "device" if machine.is_gpu else "process": estimate.overhead_bytes,
    }
    shown = ", ".join(f"{name} {size / _GIB:.1f}" for name, size in parts.items())
    return [
        _problem(
            "spec.training",
            ProblemReason.DOES_NOT_FIT,
            f"stage {largest.name} needs {estimate.memory_bytes / _GIB:.1f} GiB ({shown}) and the "
            f"device has {available / _GIB:.1f} GiB; {_memory_cure(spec, largest)}",
        )
    ]


def _memory_cure(spec: StagedFineTuneSpec, stage: PlannedStage) -> str:
    """Return what would make the stage smaller and is not done yet, cheapest first."""
    training = spec.training
    cures = []
    if training.gradient_checkpointing is GradientCheckpointing.NEVER:
        cures.append("set gradientCheckpointing: Always")
    micro_batch_size = training_of_stage(training, stage).micro_batch_size
    if training.optimizer_in_backward and micro_batch_size > 1:
        cures.append(f"lower batchSize and microBatchSize from {micro_batch_size}")
    elif micro_batch_size > 1:
        cures.append(f"lower microBatchSize from {micro_batch_size}")
    cures.append(f"lower spec.dataset.maxLength from {spec.dataset.max_length}")
    if stage.num_layers > 1:
        cures.append(f"open fewer than {stage.num_layers} layers per stage")
    if spec.method.type is MethodType.FULL:
        cures.append("use method.type: LoRA")
    if spec.method.type is MethodType.LORA:
        cures.append("use method.type: QLoRA")
    return ", ".join([*cures, "or take a larger device"])
