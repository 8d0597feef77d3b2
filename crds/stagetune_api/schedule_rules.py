"""Rules of schedules and of explicit stages as CEL: `schedule_checks` once more, a part of `rules`.

The rules with which sections stand beside one another are in `rules` itself.
"""

from stagetune_api import names
from stagetune_api.rule import Rule
from stagetune_api.training_spec import DEFAULT_STAGE_COUNT, MethodType, Order

# How many there are at least: with layersPerStage the model's depth says it.
_STAGES = (
    "(has(self.layersPerStage) ? 0 : "
    f"(has(self.stageCount) ? self.stageCount : {DEFAULT_STAGE_COUNT}) * self.passes)"
)
_BY_GRADIENT = f"self.order == '{Order.GRADIENT_NORM}'"

SCHEDULE_RULES = (
    Rule(
        "spec.schedule",
        # A thousand-millionth of slack, so that three times 0.3333333334 is not too much.
        "self.dataPartition != 'Disjoint' || !has(self.dataFraction) || "
        f"self.dataFraction * double({_STAGES}) <= 1.000000001",
        "disjoint stages cannot see more rows than there are: dataFraction times stageCount times "
        "passes is above 1; lower one of them or use dataPartition: Shared",
        ".dataFraction",
    ),
    Rule(
        "spec.schedule",
        f"{_STAGES} <= {names.MAX_STAGES}",
        f"stageCount times passes is more than the {names.MAX_STAGES} stages that a run may have; "
        "lower one of them",
        ".passes",
    ),
    Rule(
        "spec.schedule",
        "!has(self.layersPerStage) || self.overlap < self.layersPerStage",
        "overlap is not smaller than layersPerStage, so a stage would open all of the group below "
        "its own; lower it",
        ".overlap",
    ),
    Rule(
        "spec.schedule",
        "!self.cumulative || self.overlap == 0",
        "overlap has no meaning beside cumulative, which keeps whole groups open; remove one of "
        "them",
        ".overlap",
    ),
    Rule(
        "spec.schedule",
        f"!has(self.gradientNorm) || {_BY_GRADIENT}",
        "gradientNorm is only for order GradientNorm; set order or remove gradientNorm",
        ".gradientNorm",
    ),
    Rule(
        "spec.schedule",
        f"!({_BY_GRADIENT}) || (!self.cumulative && self.overlap == 0 && self.passes == 1)",
        "order GradientNorm runs the groups once, in an order of their own, and leaves some out; "
        "remove cumulative, overlap and passes",
        ".order",
    ),
    Rule(
        "spec.schedule",
        f"!({_BY_GRADIENT}) || (self.head == 'Never' && self.embeddings == 'Never')",
        "order GradientNorm may leave out the group that head or embeddings train with; use Never "
        "for both",
        ".order",
    ),
    Rule(
        "spec",
        f"self.method.type != '{MethodType.EXPAND}' || !has(self.schedule) || "
        "(self.schedule.openTop == 0 && !self.schedule.cumulative && self.schedule.overlap == 0 && "
        f"self.schedule.order != '{Order.GRADIENT_NORM}')",
        "Expand trains only blocks that it adds; remove openTop, cumulative, "
        "overlap and order GradientNorm from the schedule",
        ".schedule",
    ),
    Rule(
        "spec",
        f"self.method.type != '{MethodType.EXPAND}' || !has(self.stages) || "
        "self.stages.all(s, s.openTop == 0)",
        "Expand trains only blocks that it adds; remove openTop from the stages",
        ".stages",
    ),
    Rule(
        "spec.stages[]",
        "self.dataOffset + self.dataFraction <= 1.000000001",
        "dataOffset and dataFraction together reach beyond the rows; lower one of them, "
        "dataFraction is 1 where it is left out",
        ".dataOffset",
    ),
    Rule(
        "spec",
        f"self.method.type in ['{MethodType.LORA}', '{MethodType.QLORA}'] || !has(self.stages) || "
        "self.stages.all(s, !has(s.rank))",
        "the rank of a stage is only for method.type LoRA or QLoRA; set type or remove rank",
        ".stages",
    ),
    Rule(
        "spec",
        "!has(self.stages) || self.stages.all(s, (!has(s.batchSize) && !has(s.microBatchSize)) || "
        "(has(s.batchSize) ? s.batchSize : self.training.batchSize) % "
        "(has(s.microBatchSize) ? s.microBatchSize : self.training.microBatchSize) == 0)",
        "the microBatchSize of a stage does not divide its batchSize, those of training where it "
        "has none of its own; use a divisor",
        ".stages",
    ),
)
"""In the order in which they are shown."""
