"""What keeps a valid schedule from being cut into stages of this model; a part of `plan_checks`."""

from collections.abc import Iterator, Sequence

from stagetune_api import names
from stagetune_api.facts import Facts, ModelFacts
from stagetune_api.problems import Problem, ProblemReason
from stagetune_api.spec import StagedFineTuneSpec
from stagetune_api.training_spec import AdapterScope, LoraSpec, MethodType, ScheduleSpec
from stagetune_operator.layer_groups import split_layers
from stagetune_operator.schedule import Draft


def find_profile_problems(spec: StagedFineTuneSpec, facts: Facts) -> list[Problem]:
    """Return a problem where order GradientNorm has no profile of this model to go by."""
    if spec.gradient_profile is None:
        return []
    profile, layers = facts.gradients, facts.model.num_layers
    if profile is not None and len(profile.relative_norms) == layers:
        return []
    given = "there is none" if profile is None else f"it has {len(profile.relative_norms)} layers"
    return [
        Problem(
            path="spec.schedule.order",
            reason=ProblemReason.REQUIRED,
            message=f"GradientNorm needs a profile of the model's {layers} layers, which prepare "
            f"measures, and {given}; prepare the run again",
        )
    ]


def find_schedule_problems(
    spec: StagedFineTuneSpec, model: ModelFacts, drafts: Sequence[Draft]
) -> list[Problem]:
    """Return everything about layers, groups and ranks that this model does not have room for."""
    problems = list(_open_top_problems(spec, model.num_layers))
    schedule = spec.schedule_in_use
    if schedule is not None and not problems:
        problems += _count_problems(schedule, model.num_layers)
        problems += _overlap_problems(schedule, model.num_layers)
    return [*problems, *_rank_problems(spec, drafts)]


def _invalid(path: str, message: str) -> Problem:
    return Problem(path=path, reason=ProblemReason.INVALID, message=message)


def _open_top_problems(spec: StagedFineTuneSpec, num_layers: int) -> Iterator[Problem]:
    given = {
        f"spec.stages[{index}]": stage.open_top for index, stage in enumerate(spec.stages or [])
    }
    if spec.schedule is not None:
        given["spec.schedule"] = spec.schedule.open_top
    for path, open_top in given.items():
        if open_top >= num_layers:
            yield _invalid(
                f"{path}.openTop",
                f"{open_top} leaves no layer below: the model has {num_layers} layers; use at most "
                f"{num_layers - 1}",
            )


def _count_problems(schedule: ScheduleSpec, num_layers: int) -> Iterator[Problem]:
    layers = num_layers - schedule.open_top
    there = f"the model has {num_layers} layers"
    if schedule.open_top:
        there += f", {layers} of them below the open top"
    counts = {"layersPerStage": schedule.layers_per_stage, "stageCount": schedule.count}
    for field, count in counts.items():
        if count is not None and count > layers:
            yield _invalid(
                f"spec.schedule.{field}", f"{count} is too many: {there}; use at most {layers}"
            )
    size, passes = schedule.layers_per_stage, schedule.passes
    if size is None or -(-layers // size) * passes <= names.MAX_STAGES:
        return
    stages = f"{-(-layers // size) * passes} stages of {layers} layers"
    at_most = names.MAX_STAGES // passes
    yield _invalid(
        "spec.schedule.layersPerStage",
        f"{size} makes {stages}{f' in {passes} passes' if passes > 1 else ''} and a run has at "
        f"most {names.MAX_STAGES}; use at least {-(-layers // at_most)}",
    )


def _overlap_problems(schedule: ScheduleSpec, num_layers: int) -> Iterator[Problem]:
    groups = split_layers(schedule, num_layers)
    smallest = min((group.count for group in groups[:-1]), default=None)
    if schedule.layers_per_stage is None and smallest is not None and schedule.overlap >= smallest:
        yield _invalid(
            "spec.schedule.overlap",
            f"{schedule.overlap} is not smaller than the smallest group below another, which "
            f"has {smallest} of the model's {num_layers} layers; use at most {smallest - 1}",
        )


def _rank_problems(spec: StagedFineTuneSpec, drafts: Sequence[Draft]) -> Iterator[Problem]:
    """Yield a problem for each stage that would go on with adapters of another rank."""
    lora = spec.method.lora or LoraSpec()
    uses_lora = spec.method.type in (MethodType.LORA, MethodType.QLORA)
    if not uses_lora or lora.adapters is not AdapterScope.SHARED:
        return
    first_with: dict[int, Draft] = {}
    for draft in drafts:
        rank = draft.rank or lora.rank
        made = {layer: first_with.setdefault(layer, draft) for layer in sorted(draft.opened)}
        others = [(layer, by) for layer, by in made.items() if (by.rank or lora.rank) != rank]
        if others:
            layer, earlier = others[0]
            yield Problem(
                path=f"{draft.path}.rank",
                reason=ProblemReason.CONFLICT,
                message=f"{rank} is not possible: the stage goes on with the adapter of layer "
                f"{layer}, which {earlier.name} made with rank {earlier.rank or lora.rank}; "
                "give both the same rank, or set spec.method.lora.adapters: PerStage",
            )
