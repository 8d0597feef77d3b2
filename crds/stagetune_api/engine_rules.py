"""Rules of the engine and of several processes as CEL: `engine_checks` again, a part of `rules`.

Processes that follow from the number of GPUs are not here: the operator refuses those.
"""

from stagetune_api.rule import Rule

_IS_SHARED = (
    "has(self.runtime) && self.runtime.engine != 'Single' && "
    "(self.runtime.engine == 'DeepSpeed' || has(self.runtime.deepspeed) || "
    "self.runtime.nodes > 1 || "
    "(has(self.runtime.processesPerNode) && self.runtime.processesPerNode > 1))"
)
_IS_DIVIDED = (
    "has(self.runtime) && self.runtime.engine != 'Single' && has(self.runtime.deepspeed) && "
    "self.runtime.deepspeed.zeroStage == 3"
)
_PROCESSES = (
    "self.runtime.nodes * (has(self.runtime.processesPerNode) ? self.runtime.processesPerNode : 1)"
)
_ZERO_STAGE = ".runtime.deepspeed.zeroStage"

ENGINE_RULES = (
    Rule(
        "spec.runtime",
        "self.engine != 'Single' || !has(self.processesPerNode) || self.processesPerNode == 1",
        "several processes need engine DeepSpeed; use Auto or DeepSpeed, or remove "
        "processesPerNode",
        ".processesPerNode",
    ),
    Rule(
        "spec.runtime",
        "self.engine != 'Single' || self.nodes == 1",
        "several nodes need engine DeepSpeed; use Auto or DeepSpeed, or remove nodes",
        ".nodes",
    ),
    Rule(
        "spec",
        "!has(self.runtime) || self.runtime.nodes == 1 || !has(self.storage) || "
        "has(self.storage.claimName) || self.storage.accessMode == 'ReadWriteMany'",
        "storage.accessMode ReadWriteOnce is for the pods of one node, and runtime.nodes is more; "
        "use ReadWriteMany",
        ".storage.accessMode",
    ),
    Rule(
        "spec.runtime",
        "self.engine != 'Single' || !has(self.deepspeed)",
        "engine Single does without DeepSpeed; use Auto or DeepSpeed, or remove deepspeed",
        ".deepspeed",
    ),
    Rule(
        "spec.runtime.deepspeed",
        "self.offload != 'OptimizerAndParameters' || self.zeroStage == 3",
        "offload OptimizerAndParameters needs divided weights; set zeroStage: 3 or use Optimizer",
        ".offload",
    ),
    Rule(
        "spec",
        f"!({_IS_SHARED}) || self.training.optimizer != 'AdamW8bit'",
        "optimizer AdamW8bit scales blocks of one tensor together, and DeepSpeed cuts tensors up "
        "among processes; use AdamW",
        ".training.optimizer",
    ),
    Rule(
        "spec",
        f"!({_IS_SHARED}) || !self.training.optimizerInBackward",
        "optimizerInBackward updates before gradients are summed over DeepSpeed's processes; leave "
        "it out",
        ".training.optimizerInBackward",
    ),
    Rule(
        "spec",
        f"!({_IS_SHARED}) || (has(self.stages) ? self.stages.all(s, "
        "(has(s.microBatchSize) ? s.microBatchSize : self.training.microBatchSize) * "
        f"({_PROCESSES} - 1) < (has(s.batchSize) ? s.batchSize : self.training.batchSize)) : "
        f"self.training.microBatchSize * ({_PROCESSES} - 1) < self.training.batchSize)",
        "a batch has fewer micro-batches than there are processes; lower microBatchSize, raise "
        "batchSize or take fewer processes",
    ),
    Rule(
        "spec",
        f"!({_IS_DIVIDED}) || self.method.type != 'QLoRA'",
        "zeroStage 3 cannot divide weights in 4 bits; use 2, or method.type LoRA",
        _ZERO_STAGE,
    ),
    Rule(
        "spec",
        f"!({_IS_DIVIDED}) || !has(self.method.lora) || !self.method.lora.dora",
        "zeroStage 3 leaves no whole weights, of which DoRA takes the lengths in every pass; use 2 "
        "or leave dora out",
        _ZERO_STAGE,
    ),
    Rule(
        "spec",
        f"!({_IS_DIVIDED}) || ((!has(self.schedule) || (self.schedule.head == 'Never' && "
        "self.schedule.embeddings == 'Never')) && "
        "(!has(self.stages) || self.stages.all(s, !s.head && !s.embeddings)))",
        "zeroStage 3 divides decoder layers alone, and a stage trains the head or the embeddings "
        "too; use 2 or leave head and embeddings out",
        _ZERO_STAGE,
    ),
)
