"""StageConfig: everything that one trainer process is given, in one JSON file."""

from enum import StrEnum
from typing import Annotated, Literal, Protocol, Self

from pydantic import Field, model_validator

from stagetune_api.base import ApiModel
from stagetune_api.spec import (
    DatasetSpec,
    DeepSpeedSpec,
    EngineType,
    EvaluationSpec,
    ExportSpec,
    ModelSpec,
    Offload,
    RetainPolicy,
    RuntimeSpec,
)
from stagetune_api.training_spec import (
    GradientNormSpec,
    LayerRange,
    MethodSpec,
    ProtectionSpec,
    TrainingSpec,
)


class Task(StrEnum):
    """What a trainer process does."""

    PREPARE = "Prepare"
    TRAIN = "Train"
    EXPORT = "Export"
    EVALUATE = "Evaluate"


class RowRange(ApiModel):
    """Rows of the shuffled training set: `start` belongs to it, `end` does not."""

    start: Annotated[int, Field(ge=0)]
    """start of the range."""
    end: Annotated[int, Field(ge=1)]
    """end of the range."""

    @property
    def count(self) -> int:
        """Number of rows in the range."""
        return self.end - self.start


class StageEstimate(ApiModel):
    """What a stage will need, by the formulas of docs/plan.md."""

    trainable_parameters: Annotated[int, Field(ge=0)]
    """trainableParameters of the stage."""
    weights_bytes: Annotated[int, Field(ge=0)]
    """weightsBytes of all resident weights that do not train."""
    training_state_bytes: Annotated[int, Field(ge=0)]
    """trainingStateBytes of what trains: masters, gradients and optimizer states, on a CPU the best
    masters so far too."""
    activation_bytes: Annotated[int, Field(ge=0)]
    """activationBytes at the widest point of one micro-batch of the longest row."""
    overhead_bytes: Annotated[int, Field(ge=0)] = 0
    """overheadBytes that are there before anything of the stage is: a GPU's context, or on a CPU
    the process with its code loaded. 0 in plans of versions before this field."""
    memory_bytes: Annotated[int, Field(ge=0)]
    """memoryBytes at the peak, overheadBytes included: of a step (weights, training state and
    activations), or of another phase of the stage where that takes more."""
    disk_bytes: Annotated[int, Field(ge=0)]
    """diskBytes of the stage's checkpoints and output at their largest."""
    checkpoint_bytes: Annotated[int, Field(ge=0)] = 0
    """checkpointBytes of one checkpoint."""
    step_flops: Annotated[int, Field(ge=0)]
    """stepFlops of one optimizer step on rows of mean length."""
    relative_step_flops: Annotated[float, Field(ge=0)]
    """relativeStepFlops is stepFlops over that of full fine-tuning with the same settings."""

    def peak_bytes(self, device: str) -> int:
        """Return what of memoryBytes a stage's `peakMemoryBytes` on `device` measures.

        A GPU's context is no part of what PyTorch allocates on it.
        """
        return self.memory_bytes - (self.overhead_bytes if device == "cuda" else 0)


class PrefixCachePlan(ApiModel):
    """What was decided about the hidden states below a stage."""

    used: bool
    """used says whether they are computed once and kept on the volume."""
    reason: str
    """reason in words."""
    begins_at: Annotated[int, Field(ge=0)] = 0
    """beginsAt is the layer below which they are there already, by an earlier stage; 0 where they
    are computed from the tokens."""
    disk_bytes: Annotated[int, Field(ge=0)] = 0
    """diskBytes that they take on the volume."""
    flops: Annotated[int, Field(ge=0)] = 0
    """flops of computing them once."""


class PlannedStage(ApiModel):
    """One stage with every number resolved."""

    index: Annotated[int, Field(ge=0)]
    """index in running order, from 0."""
    name: str
    """name, unique in the run."""
    layers: LayerRange
    """layers that the stage opens."""
    top_layers: LayerRange | None = None
    """topLayers that it opens too; between `layers` and them at least one layer stays frozen.
    Absent where there are none, or where they would touch: `layers` then reaches to the top."""
    embeddings: bool
    """embeddings says whether the input embeddings train too."""
    head: bool
    """head says whether the final norm and the head train too."""
    learning_rate: float
    """learningRate at its highest."""
    epochs: float
    """epochs over the stage's rows."""
    rows: RowRange
    """rows of the training set, in its one shuffled order, that the stage sees."""
    batch_size: Annotated[int, Field(ge=1)] | None = None
    """batchSize of this stage where it is not that of `training`."""
    micro_batch_size: Annotated[int, Field(ge=1)] | None = None
    """microBatchSize of this stage where it is not that of `training`."""
    rank: Annotated[int, Field(ge=1)] | None = None
    """rank of this stage's adapters where it is not that of `method.lora`."""
    steps: Annotated[int, Field(ge=1)]
    """steps of the optimizer."""
    warmup_steps: Annotated[int, Field(ge=0)]
    """warmupSteps in which the rate rises."""
    validation_interval: Annotated[int, Field(ge=1)]
    """validationInterval in steps."""
    estimate: StageEstimate
    """estimate of what the stage needs."""
    prefix_cache: PrefixCachePlan | None = None
    """prefixCache says whether hidden states below the stage are kept, and why; absent where
    nothing lies below it."""

    @property
    def layer_ranges(self) -> tuple[LayerRange, ...]:
        """All layers that the stage opens, in one or two ranges, bottom to top."""
        return (self.layers,) if self.top_layers is None else (self.layers, self.top_layers)

    @property
    def num_layers(self) -> int:
        """Number of layers that the stage opens."""
        return sum(layers.count for layers in self.layer_ranges)

    @property
    def directory(self) -> str:
        """Name of the stage's folder, which sorts in running order: `01-layers-0-7`."""
        return f"{self.index + 1:02d}-{self.name}"


class BatchSizes(Protocol):
    """What may have batch sizes of its own: a stage, planned or about to be."""

    @property
    def batch_size(self) -> int | None:
        """Rows of a step; None where those of `training` count."""

    @property
    def micro_batch_size(self) -> int | None:
        """Rows computed at once; None where those of `training` count."""


def training_of_stage(training: TrainingSpec, stage: BatchSizes | None) -> TrainingSpec:
    """Return `training` with the batch sizes of `stage` where it has some of its own."""
    if stage is None:
        return training
    sizes = {"batch_size": stage.batch_size, "micro_batch_size": stage.micro_batch_size}
    return training.model_copy(update={name: size for name, size in sizes.items() if size})


class EnginePlan(ApiModel):
    """DeepSpeed's processes for one stage, and what they divide among them."""

    processes_per_node: Annotated[int, Field(ge=1, le=64)]
    """processesPerNode that train together."""
    nodes: Annotated[int, Field(ge=1, le=64)] = 1
    """nodes on each of which a pod starts so many."""
    zero_stage: Annotated[int, Field(ge=2, le=3)]
    """zeroStage: 2 divides gradients and optimizer states, 3 also the layers' weights."""
    offload: Offload = Offload.NONE
    """offload says what is kept in host memory."""

    @property
    def num_processes(self) -> int:
        """Number of processes in all."""
        return self.nodes * self.processes_per_node


def plan_engine(runtime: RuntimeSpec | None, *, num_gpus: int = 0) -> EnginePlan | None:
    """Return how a stage's processes work together; None for one process without DeepSpeed.

    `num_gpus` are those of a training pod; 0 for a run on one machine, which takes several
    processes only where it is told how many.
    """
    if runtime is None or runtime.engine is EngineType.SINGLE:
        return None
    processes = runtime.processes_per_node or max(num_gpus, 1)
    uses_deepspeed = runtime.engine is EngineType.DEEPSPEED or runtime.deepspeed is not None
    if processes * runtime.nodes == 1 and not uses_deepspeed:
        return None
    options = runtime.deepspeed or DeepSpeedSpec()
    return EnginePlan(
        processes_per_node=processes,
        nodes=runtime.nodes,
        zero_stage=options.zero_stage,
        offload=options.offload,
    )


class ParentRef(ApiModel):
    """The verified output that a stage goes on from."""

    path: str
    """path of the output folder."""
    digest: str
    """digest of its content, which the stage checks before anything else."""


class StageConfig(ApiModel):
    """Everything one trainer process is given; written by the runner, read by the trainer."""

    api_version: Literal["stagetune.io/v1alpha1"] = "stagetune.io/v1alpha1"
    """apiVersion of this file."""
    kind: Literal["StageConfig"] = "StageConfig"
    """kind of this file."""
    task: Task
    """task of the process."""
    run_name: str
    """runName of the run it belongs to."""
    attempt: Annotated[int, Field(ge=0)] = 0
    """attempt at this task, from 1. It is the fencing token too: only the holder of the newest may
    publish. At 0 the process takes the next number itself: all pods of a Job are given the same
    file."""
    run_directory: str
    """runDirectory on the volume."""
    models_directory: str
    """modelsDirectory that is shared between runs."""
    manifest_directory: str
    """manifestDirectory from which relative file:// sources count."""
    claims_directory: str | None = None
    """claimsDirectory in which each claim of a pvc:// source is mounted by its name."""
    retain: RetainPolicy = RetainPolicy.EVERYTHING
    """retain says what Export leaves of the run's folder after its result is published."""
    model: ModelSpec
    """model that the run starts from."""
    dataset: DatasetSpec
    """dataset that the run trains on."""
    method: MethodSpec
    """method says what trains."""
    training: TrainingSpec
    """training says how; a stage's own batch sizes stand here already."""
    protection: ProtectionSpec = ProtectionSpec()
    """protection says what keeps the model from forgetting."""
    gradient_norm: GradientNormSpec | None = None
    """gradientNorm asks Prepare for a profile of gradient norms."""
    evaluation: EvaluationSpec
    """evaluation says what is measured."""
    export: ExportSpec
    """export says what is left."""
    model_directory: str | None = None
    """modelDirectory of the prepared base model; for every task but Prepare."""
    model_digest: str | None = None
    """modelDigest of the prepared base model, checked before use."""
    data_digest: str | None = None
    """dataDigest of the tokenised rows, checked before use."""
    stage: PlannedStage | None = None
    """stage to train; only for Train."""
    engine: EnginePlan | None = None
    """engine that several processes train the stage with; absent where one alone does. It does not
    decide the result but for rounding, so another attempt may have another one."""
    chain: Annotated[list[ParentRef], Field(max_length=128)] = Field(default_factory=list)
    """chain of the outputs of all earlier stages, oldest first; the last one is the parent."""
    stages: Annotated[list[PlannedStage], Field(max_length=128)] = Field(default_factory=list)
    """stages of the whole plan; for Export, which names them in the model card."""
    averaging_alpha: Annotated[float, Field(ge=0, le=1)] | None = None
    """averagingAlpha that Evaluate has chosen; for Export, where the manifest gives none."""

    def forecast(self) -> "StageConfig":
        """Return the file as far as it is known before the last stage of `chain` is done."""
        return self.model_copy(update={"chain": self.chain[:-1]})

    @model_validator(mode="after")
    def _has_what_its_task_needs(self) -> Self:
        missing = []
        if self.task is not Task.PREPARE:
            needed = {
                "modelDirectory": self.model_directory,
                "modelDigest": self.model_digest,
                "dataDigest": self.data_digest,
            }
            missing = [name for name, value in needed.items() if value is None]
        if self.task is Task.TRAIN and self.stage is None:
            missing.append("stage")
        if self.task in (Task.EXPORT, Task.EVALUATE) and not self.chain:
            missing.append("chain")
        averaging = self.protection.averaging
        if (
            self.task is Task.EXPORT
            and averaging is not None
            and averaging.alpha is None
            and self.averaging_alpha is None
        ):
            missing.append("averagingAlpha")
        if missing:
            raise ValueError(f"a {self.task} task needs {', '.join(missing)}")
        if self.engine is not None and self.task is not Task.TRAIN:
            raise ValueError(f"a {self.task} task has one process and no engine")
        own = self.stage.batch_size if self.stage is not None else None
        if own is not None and own != self.training.batch_size:
            raise ValueError(
                f"training.batchSize is {self.training.batch_size}, and {own} in the stage"
            )
        return self
