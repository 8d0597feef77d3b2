"""Rules of method, stages, training and protection as CEL: `training_checks` once more, a part of
`rules`.
"""

from stagetune_api.rule import Rule
from stagetune_api.training_spec import MethodType

_USES_LORA = f"self.method.type in ['{MethodType.LORA}', '{MethodType.QLORA}']"
_HAS_REPLAY = "(has(self.protection) && has(self.protection.replay))"
_DECODER_LAYERS_ONLY = (
    "adapters stand only in decoder layers; use method.type: Full or leave {} out"
)
_NO_EXPAND = f"self.method.type != '{MethodType.EXPAND}'"
_ADDED_BLOCKS_ONLY = "only added blocks train with Expand; use method.type: Full or remove {}"

TRAINING_RULES = (
    Rule(
        "spec",
        "!has(self.schedule) || !has(self.stages)",
        "stages lists the stages already; remove schedule or stages",
        ".schedule",
    ),
    Rule(
        "spec.schedule",
        "!has(self.layersPerStage) || !has(self.stageCount)",
        "layersPerStage and stageCount say the same thing twice; remove one of them",
        ".layersPerStage",
    ),
    Rule(
        "spec.stages[].layers",
        "self.first <= self.last",
        "last is below first; both ends belong to the range",
        ".last",
    ),
    Rule(
        "spec.stages[]",
        "!self.embeddings || self.layers.first == 0",
        "the embeddings train with layer 0; set layers.first to 0 or leave embeddings out",
        ".embeddings",
    ),
    Rule(
        "spec.method",
        "!has(self.lora) || self.type in ['LoRA', 'QLoRA']",
        "lora is only for method.type LoRA or QLoRA; set type or remove lora",
        ".lora",
    ),
    Rule(
        "spec.method",
        "!has(self.expand) || self.type == 'Expand'",
        "expand is only for method.type Expand; set type or remove expand",
        ".expand",
    ),
    Rule(
        "spec",
        f"!({_USES_LORA}) || !has(self.schedule) || self.schedule.head == 'Never'",
        _DECODER_LAYERS_ONLY.format("schedule.head"),
        ".schedule.head",
    ),
    Rule(
        "spec",
        f"!({_USES_LORA}) || !has(self.schedule) || self.schedule.embeddings == 'Never'",
        _DECODER_LAYERS_ONLY.format("schedule.embeddings"),
        ".schedule.embeddings",
    ),
    Rule(
        "spec",
        f"!({_USES_LORA}) || !has(self.stages) || self.stages.all(s, !s.head && !s.embeddings)",
        _DECODER_LAYERS_ONLY.format("head and embeddings of every stage"),
        ".stages",
    ),
    Rule(
        "spec",
        f"{_NO_EXPAND} || !has(self.schedule) || self.schedule.head == 'Never'",
        _ADDED_BLOCKS_ONLY.format("schedule.head"),
        ".schedule.head",
    ),
    Rule(
        "spec",
        f"{_NO_EXPAND} || !has(self.schedule) || self.schedule.embeddings == 'Never'",
        _ADDED_BLOCKS_ONLY.format("schedule.embeddings"),
        ".schedule.embeddings",
    ),
    Rule(
        "spec",
        f"{_NO_EXPAND} || !has(self.stages) || self.stages.all(s, !s.head && !s.embeddings)",
        _ADDED_BLOCKS_ONLY.format("head and embeddings of every stage"),
        ".stages",
    ),
    Rule(
        "spec",
        "!has(self.method.lora) || !self.method.lora.dora || "
        "self.method.lora.adapters != 'PerStage'",
        "adapters PerStage with dora do not add up; use Shared or leave dora out",
        ".method.lora.adapters",
    ),
    Rule(
        "spec.training",
        "!has(self.learningRate) || !has(self.learningRateByDepth)",
        "learningRate and learningRateByDepth are both given; keep one of them",
        ".learningRate",
    ),
    Rule(
        "spec",
        "has(self.training.learningRate) || has(self.training.learningRateByDepth) || "
        "(has(self.stages) && self.stages.all(s, has(s.learningRate)))",
        "give training.learningRate or training.learningRateByDepth; 2e-5 to 1e-4 is usual for "
        "Full and 1e-4 to 1e-3 for LoRA; Expand begins well at 1e-4",
        ".training.learningRate",
    ),
    Rule(
        "spec",
        "!has(self.training.learningRateByDepth) || !has(self.stages) || "
        "self.stages.all(s, !has(s.learningRate))",
        "training.learningRateByDepth already gives every stage a rate; remove it or the stages' "
        "learningRate",
        ".stages",
    ),
    Rule(
        "spec",
        "self.training.batchSize % self.training.microBatchSize == 0",
        "microBatchSize does not divide batchSize; use a divisor",
        ".training.microBatchSize",
    ),
    Rule(
        "spec.training",
        # The section's own default is checked too, before anything in it has one.
        "!has(self.packing) || !has(self.groupByLength) || !self.packing || !self.groupByLength",
        "packing leaves no padding that groupByLength would save; remove one of the two",
        ".groupByLength",
    ),
    Rule(
        "spec.protection.replay",
        "has(self.source) != has(self.generated)",
        "give exactly one of replay.source and replay.generated",
        ".source",
    ),
    Rule(
        "spec",
        f"!{_HAS_REPLAY} || !has(self.protection.replay.source) || "
        "!has(self.evaluation.generalText) || "
        "self.protection.replay.source != self.evaluation.generalText.source",
        "replay.source is evaluation.generalText.source too, and text that is trained on measures "
        "no forgetting; give one of the two another source",
        ".protection.replay.source",
    ),
    Rule(
        "spec",
        f"!{_HAS_REPLAY} || !self.training.optimizerInBackward",
        "replayed rows are micro-batches of their own and training.optimizerInBackward makes a "
        "batch one micro-batch; remove one of the two",
        ".protection.replay",
    ),
    Rule(
        "spec",
        "!has(self.protection) || !has(self.protection.anchor) || self.method.type != 'Expand'",
        "method.type Expand has layers that are not the base model's, so there is nothing to "
        "anchor them to; use distillation or remove anchor",
        ".protection.anchor",
    ),
    Rule(
        "spec",
        "!self.training.optimizerInBackward || (has(self.stages) ? self.stages.all(s, "
        "(has(s.batchSize) ? s.batchSize : self.training.batchSize) == "
        "(has(s.microBatchSize) ? s.microBatchSize : self.training.microBatchSize)) : "
        "self.training.batchSize == self.training.microBatchSize)",
        "optimizerInBackward needs a batch of one micro-batch; make microBatchSize equal to "
        "batchSize, or leave it out",
        ".training.optimizerInBackward",
    ),
    Rule(
        "spec",
        f"self.export.format != 'Adapter' || {_USES_LORA}",
        "export.format Adapter needs method.type LoRA or QLoRA; use Merged",
        ".export.format",
    ),
    *(
        rule
        for field in ("averaging", "depthScaling")
        for rule in (
            Rule(
                "spec",
                f"!has(self.protection) || !has(self.protection.{field}) || "
                "self.method.type != 'Expand'",
                f"{field} has no base weights for the blocks that method.type Expand adds; leave "
                "it out",
                f".protection.{field}",
            ),
            Rule(
                "spec",
                f"!has(self.protection) || !has(self.protection.{field}) || "
                "self.method.type == 'Expand' || !has(self.method.lora) || "
                "!self.method.lora.dora || self.export.format != 'Adapter'",
                f"{field} of DoRA gives weights that no adapter holds; use export.format: Merged "
                "or leave it out",
                f".protection.{field}",
            ),
        )
    ),
)
