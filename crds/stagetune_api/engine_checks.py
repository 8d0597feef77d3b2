"""What DeepSpeed and several processes do not go with; `engine_rules` says the same as CEL.

A part of `spec_checks`.
"""

from collections.abc import Iterator

from stagetune_api.problems import Problem, conflict
from stagetune_api.spec import AccessMode, EngineType, Offload, StagedFineTuneSpec
from stagetune_api.stage import EnginePlan, plan_engine, training_of_stage
from stagetune_api.training_spec import (
    EmbeddingsPolicy,
    HeadPolicy,
    MethodType,
    OptimizerType,
)


def check_engine(spec: StagedFineTuneSpec) -> Iterator[Problem]:
    """Refuse what contradicts the engine that the manifest names, whatever runs it."""
    runtime = spec.runtime
    if runtime is None:
        return
    is_single = runtime.engine is EngineType.SINGLE
    if is_single and (runtime.processes_per_node or 1) > 1:
        yield conflict(
            "spec.runtime.processesPerNode",
            f"{runtime.processes_per_node} processes need engine DeepSpeed, and engine is Single; "
            "use Auto or DeepSpeed, or remove processesPerNode",
        )
    if is_single and runtime.nodes > 1:
        yield conflict(
            "spec.runtime.nodes",
            f"{runtime.nodes} nodes need engine DeepSpeed, and engine is Single; use Auto or "
            "DeepSpeed, or remove nodes",
        )
    if is_single and runtime.deepspeed is not None:
        yield conflict(
            "spec.runtime.deepspeed",
            "engine Single does without DeepSpeed; use Auto or DeepSpeed, or remove deepspeed",
        )
    options = runtime.deepspeed
    if (
        options is not None
        and options.offload is Offload.OPTIMIZER_AND_PARAMETERS
        and options.zero_stage != 3
    ):
        yield conflict(
            "spec.runtime.deepspeed.offload",
            "OptimizerAndParameters offloads divided weights, which zeroStage 3 alone has; set "
            "zeroStage: 3 or use Optimizer",
        )
    storage = spec.storage
    if (
        runtime.nodes > 1
        and storage is not None
        and storage.claim_name is None
        and storage.access_mode is AccessMode.READ_WRITE_ONCE
    ):
        yield conflict(
            "spec.storage.accessMode",
            f"ReadWriteOnce is for the pods of one node, and runtime.nodes is {runtime.nodes}; use "
            "ReadWriteMany with a storage class that has it",
        )
    plan = plan_engine(runtime)
    if plan is not None:
        yield from check_engine_plan(spec, plan)


def check_engine_plan(spec: StagedFineTuneSpec, plan: EnginePlan) -> Iterator[Problem]:
    """Refuse what DeepSpeed with the processes of `plan` cannot train."""
    if spec.training.optimizer is OptimizerType.ADAMW_8BIT:
        yield conflict(
            "spec.training.optimizer",
            "AdamW8bit scales blocks of one tensor together, and DeepSpeed cuts tensors up among "
            "processes; use AdamW, whose states are divided instead",
        )
    if spec.training.optimizer_in_backward:
        yield conflict(
            "spec.training.optimizerInBackward",
            "DeepSpeed updates after the backward pass, when gradients are summed over processes; "
            "leave it out",
        )
    yield from _check_batch_sizes(spec, plan)
    if plan.zero_stage == 3:
        yield from _check_divided_weights(spec)


def _check_batch_sizes(spec: StagedFineTuneSpec, plan: EnginePlan) -> Iterator[Problem]:
    for index, stage in enumerate(spec.stages or [None]):
        training = training_of_stage(spec.training, stage)
        batch, micro_batch = training.batch_size, training.micro_batch_size
        if micro_batch * (plan.num_processes - 1) < batch:
            continue
        owner = "spec.training"
        if stage is not None and (stage.batch_size or stage.micro_batch_size):
            owner = f"spec.stages[{index}]"
        yield conflict(
            f"{owner}.microBatchSize",
            f"a batch of {batch} rows has {-(-batch // micro_batch)} micro-batches of "
            f"{micro_batch}, too few for {plan.num_processes} processes; lower it, raise batchSize "
            "or take fewer processes",
        )


def _check_divided_weights(spec: StagedFineTuneSpec) -> Iterator[Problem]:
    path = "spec.runtime.deepspeed.zeroStage"
    lora = spec.method.lora
    if spec.method.type is MethodType.QLORA:
        yield conflict(path, "3 cannot divide weights in 4 bits; use 2, or method.type LoRA")
    if lora is not None and lora.dora:
        yield conflict(
            path,
            "3 leaves no whole weights, of which DoRA takes the lengths in every pass; use 2 or "
            "leave dora out",
        )
    schedule = spec.schedule
    opens_more = schedule is not None and (
        schedule.head is not HeadPolicy.NEVER or schedule.embeddings is not EmbeddingsPolicy.NEVER
    )
    if opens_more or any(stage.head or stage.embeddings for stage in spec.stages or []):
        yield conflict(
            path,
            "3 divides decoder layers alone, and a stage trains the head or the embeddings too; "
            "use 2 or leave head and embeddings out",
        )
