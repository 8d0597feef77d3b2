"""The manifest: what a user writes, field by field.

The models hold types, ranges and sizes; rules that look at more than one field are in
`spec_checks` and, as CEL, in `rules`. Every list, string and map has a maximum so that the API
server can bound the cost of those rules.
"""

from enum import StrEnum
from typing import Annotated, Literal

from pydantic import ConfigDict, Field, StringConstraints

from stagetune_api import names
from stagetune_api.base import ApiModel

SourceUri = Annotated[
    str,
    StringConstraints(max_length=2048, pattern=r"^(hf|ms|s3|pvc|file)://.+$"),
]
ObjectName = Annotated[
    str,
    StringConstraints(min_length=1, max_length=253, pattern=r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$"),
]
ColumnName = Annotated[str, StringConstraints(min_length=1, max_length=128)]
Fraction = Annotated[float, Field(ge=0, le=1)]
LearningRate = Annotated[float, Field(gt=0, le=1)]
Weight = Annotated[float, Field(ge=0, le=1000)]
Quantity = (
    Annotated[int, Field(ge=0)]
    | Annotated[
        str,
        StringConstraints(max_length=32, pattern=r"^[0-9]+(\.[0-9]+)?(m|k|[KMGTP]i|[MGTP])?$"),
    ]
)
"""An amount as Kubernetes writes it: 1, "500m", "48Gi"."""
LabelKey = Annotated[str, StringConstraints(min_length=1, max_length=317)]
LabelValue = Annotated[str, StringConstraints(max_length=63)]


class DataFormat(StrEnum):
    """Shapes of a training row; docs/data.md shows each."""

    AUTO = "Auto"
    MESSAGES = "Messages"
    SHARE_GPT = "ShareGPT"
    ALPACA = "Alpaca"
    QUERY_RESPONSE = "QueryResponse"


class TooLongPolicy(StrEnum):
    """What happens to a row with more tokens than `maxLength`."""

    REJECT = "Reject"
    TRUNCATE = "Truncate"


class MethodType(StrEnum):
    """What trains inside a stage."""

    FULL = "Full"
    LORA = "LoRA"
    QLORA = "QLoRA"
    EXPAND = "Expand"


class AdapterScope(StrEnum):
    """Whether a layer that is opened again goes on with its adapter or gets another one."""

    SHARED = "Shared"
    PER_STAGE = "PerStage"


class Order(StrEnum):
    """Which end of the decoder is trained first."""

    BOTTOM_UP = "BottomUp"
    TOP_DOWN = "TopDown"
    GRADIENT_NORM = "GradientNorm"


class HeadPolicy(StrEnum):
    """Whether the final norm and the language-model head are trained."""

    NEVER = "Never"
    LAST_STAGE = "LastStage"


class EmbeddingsPolicy(StrEnum):
    """Whether the input embeddings are trained."""

    NEVER = "Never"
    FIRST_STAGE = "FirstStage"


class DataPartition(StrEnum):
    """Whether stages see the same rows or each its own."""

    SHARED = "Shared"
    DISJOINT = "Disjoint"


class Interpolation(StrEnum):
    """How a value moves from the bottom of the decoder to its top."""

    GEOMETRIC = "Geometric"
    LINEAR = "Linear"


class OptimizerType(StrEnum):
    """The optimizer of a stage."""

    ADAMW = "AdamW"
    ADAMW_8BIT = "AdamW8bit"


class LearningRateSchedule(StrEnum):
    """How the learning rate moves inside a stage after warm-up."""

    COSINE = "Cosine"
    CONSTANT = "Constant"


class Precision(StrEnum):
    """The number format of the computation; `optimizer` says in which one what trains is kept."""

    AUTO = "Auto"
    BF16 = "BF16"
    FP32 = "FP32"


class GradientCheckpointing(StrEnum):
    """Whether activations above the frozen prefix are recomputed in the backward pass."""

    ALWAYS = "Always"
    NEVER = "Never"


class PrefixCache(StrEnum):
    """Whether hidden states at the border of the frozen prefix are kept on the volume."""

    NEVER = "Never"
    AUTO = "Auto"


class EngineType(StrEnum):
    """What runs the backward pass and the optimizer."""

    AUTO = "Auto"
    SINGLE = "Single"
    DEEPSPEED = "DeepSpeed"


class RetainPolicy(StrEnum):
    """What stays on the volume when the run object is deleted."""

    RESULT = "Result"
    EVERYTHING = "Everything"
    NOTHING = "Nothing"


class ExportFormat(StrEnum):
    """What the finished run leaves for others to load."""

    MERGED = "Merged"
    ADAPTER = "Adapter"


class ExportDtype(StrEnum):
    """Number format of exported weights; `Auto` is that of the base model."""

    AUTO = "Auto"
    BF16 = "BF16"
    FP32 = "FP32"


class ModelSpec(ApiModel):
    """The base model."""

    source: SourceUri
    """source of the base model: hf://org/name, ms://org/name, or a folder of safetensors or one
    GGUF file by pvc://claim/path on a cluster and file://path on one machine. A relative file://
    path counts from the manifest's folder."""
    revision: Annotated[str, StringConstraints(min_length=1, max_length=128)] | None = None
    """revision of an hf:// or ms:// source. Pin a commit: branches and tags can move."""
    secret_name: ObjectName | None = None
    """secretName of the Secret whose key `token` opens a private hub repository. On one machine the
    token comes from the environment variable HF_TOKEN or MODELSCOPE_API_TOKEN instead."""
    chat_template: Annotated[str, StringConstraints(max_length=32768)] | None = None
    """chatTemplate is a Jinja chat template used instead of the tokenizer's own; needed where the
    tokenizer has none. It is exported with the model."""


class ColumnsSpec(ApiModel):
    """Names of the data's columns where they differ from the usual ones."""

    messages: ColumnName | None = None
    """messages is the column with the list of turns (Messages, ShareGPT)."""
    system: ColumnName | None = None
    """system is the column with the system prompt."""
    query: ColumnName | None = None
    """query is the column with the question (QueryResponse) or the instruction (Alpaca)."""
    input: ColumnName | None = None
    """input is the column with the input that follows the instruction (Alpaca)."""
    response: ColumnName | None = None
    """response is the column with the answer (QueryResponse, Alpaca)."""
    history: ColumnName | None = None
    """history is the column with earlier question-answer pairs (QueryResponse, Alpaca)."""


class ValidationSpec(ApiModel):
    """Where validation rows come from: exactly one of `fraction` and `source`."""

    fraction: Annotated[float, Field(gt=0, lt=1)] | None = None
    """fraction of the dataset's rows kept out of training and used for validation."""
    source: SourceUri | None = None
    """source of validation rows of their own, in the same format as the dataset."""


class DatasetSpec(ApiModel):
    """The training data and how it becomes tokens."""

    source: SourceUri
    """source of the rows: hf://org/name or hf://org/name/path, ms://..., or a JSONL, JSON, CSV or
    Parquet file or a folder of them by pvc://claim/path on a cluster and file://path on one
    machine. Relative file:// paths count from the manifest."""
    revision: Annotated[str, StringConstraints(min_length=1, max_length=128)] | None = None
    """revision of an hf:// or ms:// source."""
    secret_name: ObjectName | None = None
    """secretName of the Secret whose key `token` opens a private hub repository."""
    format: DataFormat = DataFormat.AUTO
    """format of the rows. `Auto` finds it from the columns of the first rows and shows what it
    found."""
    columns: ColumnsSpec | None = None
    """columns names the data's columns where `Auto` cannot know them."""
    validation: ValidationSpec
    """validation says where validation rows come from; every stage is judged by them."""
    max_length: Annotated[int, Field(ge=8, le=1048576)] = 2048
    """maxLength of one row in tokens, chat template included."""
    too_long: TooLongPolicy = TooLongPolicy.REJECT
    """tooLong says whether a row above `maxLength` counts as invalid or is cut at its end."""
    max_invalid_ratio: Fraction = 0.0
    """maxInvalidRatio of rows that may be dropped (each is reported with its line and reason)
    before the run fails. The default allows none."""


class LoraSpec(ApiModel):
    """Low-rank adapters (arXiv 2106.09685) inside the layers of a stage."""

    rank: Annotated[int, Field(ge=1, le=1024)] = 16
    """rank of the adapters."""
    alpha: Annotated[float, Field(gt=0, le=4096)] | None = None
    """alpha scales the adapters by alpha/rank. Left out, it is twice the rank."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """dropout in front of the adapters while training."""
    target_modules: (
        Annotated[
            list[Annotated[str, StringConstraints(min_length=1, max_length=64)]],
            Field(min_length=1, max_length=32),
        ]
        | None
    ) = None
    """targetModules are the linear modules of a decoder layer that get an adapter, by the last part
    of their name (`q_proj`). Left out, all linear modules do."""
    rank_stabilized: bool = False
    """rankStabilized scales the adapters by alpha over the square root of the rank (rsLoRA, arXiv
    2312.03732), so that a larger rank learns more."""
    dora: bool = False
    """dora trains the length of each weight's rows beside the adapters (DoRA, arXiv 2402.09353)."""
    adapters: AdapterScope = AdapterScope.SHARED
    """adapters says what a stage that opens a layer again does: Shared goes on with the layer's
    adapter, PerStage adds one of its own. All of them are merged at export."""


class ExpandSpec(ApiModel):
    """Added decoder blocks (LLaMA Pro, arXiv 2401.02415)."""

    layers_per_block: Annotated[int, Field(ge=1, le=128)] = 4
    """layersPerBlock is the number of existing layers after which one block is added. A stage
    trains the blocks that were added behind its layers."""


class MethodSpec(ApiModel):
    """What trains inside a stage."""

    type: MethodType = MethodType.FULL
    """type of training: Full opens the stage's weights, LoRA puts adapters beside them, QLoRA does
    so beside weights in 4 bits, Expand adds blocks and trains those alone."""
    lora: LoraSpec | None = None
    """lora holds the adapter options; only with type LoRA or QLoRA."""
    expand: ExpandSpec | None = None
    """expand holds the options of added blocks; only with type Expand."""


class GradientNormSpec(ApiModel):
    """How a profile of gradient norms becomes stages (order GradientNorm).

    A layer's signal is the norm of its gradient over the norm of its weights (Auto-RGN, arXiv
    2210.11466), measured by prepare on the base model; a group's share is its mean signal over that
    of all layers.
    """

    batches: Annotated[int, Field(ge=1, le=1024)] = 8
    """batches of `batchSize` training rows that are measured, each micro-batch's gradient by
    itself."""
    skip_below: Annotated[float, Field(ge=0, le=1)] = 0.25
    """skipBelow this share a group is not trained. The group with the largest share always is."""
    merge_below: Annotated[float, Field(ge=0, le=10)] = 0.75
    """mergeBelow this share, neighbouring groups that are trained become one stage."""
    floor: Annotated[float, Field(gt=0, le=1)] = 0.5
    """floor of a stage's passes, as a part of `epochsPerStage`."""
    cap: Annotated[float, Field(ge=1, le=100)] = 2.0
    """cap of a stage's passes, as a multiple of `epochsPerStage`; between the two they follow the
    stage's share."""


class ScheduleSpec(ApiModel):
    """How the decoder is cut into stages: give `layersPerStage` or `stageCount`."""

    layers_per_stage: Annotated[int, Field(ge=1, le=1024)] | None = None
    """layersPerStage is the number of decoder layers a stage opens. Where the model's depth does
    not divide evenly, the stage at the top is the smaller one."""
    stage_count: Annotated[int, Field(ge=1, le=128)] | None = None
    """stageCount is the number of stages; layers are spread evenly, larger groups at the bottom."""
    order: Order = Order.BOTTOM_UP
    """order in which the groups are opened."""
    head: HeadPolicy = HeadPolicy.NEVER
    """head says whether the stage with the topmost layers also trains the final norm and the
    language-model head. Refused for models whose head is tied to the embeddings."""
    embeddings: EmbeddingsPolicy = EmbeddingsPolicy.NEVER
    """embeddings says whether the stage with the bottommost layers also trains the input
    embeddings."""
    epochs_per_stage: Annotated[float, Field(gt=0, le=1000)] = 1.0
    """epochsPerStage is the number of passes a stage makes over its rows."""
    data_fraction: Annotated[float, Field(gt=0, le=1)] | None = None
    """dataFraction of the training rows that a stage sees. Left out: all of them when
    `dataPartition` is Shared, an equal share when it is Disjoint."""
    data_partition: DataPartition = DataPartition.SHARED
    """dataPartition says whether all stages see the same rows or each stage rows of its own."""
    open_top: Annotated[int, Field(ge=0, le=1024)] = 0
    """openTop is the number of layers at the top of the decoder that every stage opens beside its
    own (SegProp). The groups are cut from the layers below them."""
    cumulative: bool = False
    """cumulative keeps layers open once a stage has opened them, and head and embeddings too:
    gradual unfreezing (ULMFiT, arXiv 1801.06146)."""
    overlap: Annotated[int, Field(ge=0, le=1023)] = 0
    """overlap is the number of layers of the group below that a stage opens too; smaller than that
    group."""
    passes: Annotated[int, Field(ge=1, le=128)] = 1
    """passes is the number of times that the whole sequence of stages is run. Disjoint stages have
    rows of their own in every pass."""
    gradient_norm: GradientNormSpec | None = None
    """gradientNorm holds the options of order GradientNorm; only with that order."""


class LayerRange(ApiModel):
    """Decoder layers, counted from 0 at the bottom; both ends belong to it."""

    first: Annotated[int, Field(ge=0, le=1023)]
    """first layer, the one nearest to the embeddings."""
    last: Annotated[int, Field(ge=0, le=1023)]
    """last layer, the one nearest to the head."""

    @property
    def count(self) -> int:
        """Number of layers in the range."""
        return self.last - self.first + 1


class ExplicitStageSpec(ApiModel):
    """One stage of an explicit list."""

    name: Annotated[
        str,
        StringConstraints(
            min_length=1,
            max_length=names.STAGE_NAME_MAX_LENGTH,
            pattern=names.DNS_LABEL_PATTERN,
        ),
    ]
    """name of the stage, unique in the list."""
    layers: LayerRange
    """layers that the stage opens."""
    embeddings: bool = False
    """embeddings says whether the stage also trains the input embeddings; it must open layer 0."""
    head: bool = False
    """head says whether the stage also trains the final norm and the language-model head; it must
    open the topmost layer."""
    learning_rate: LearningRate | None = None
    """learningRate of this stage; left out, that of `training` counts."""
    epochs: Annotated[float, Field(gt=0, le=1000)] = 1.0
    """epochs is the number of passes the stage makes over its rows."""
    data_fraction: Annotated[float, Field(gt=0, le=1)] = 1.0
    """dataFraction of the training rows that the stage sees."""
    data_offset: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """dataOffset is where in the one shuffled order of the training rows the stage's rows begin, as
    a part of all rows. With it stages see rows of their own."""
    open_top: Annotated[int, Field(ge=0, le=1024)] = 0
    """openTop is the number of layers at the top of the decoder that the stage opens too."""
    batch_size: Annotated[int, Field(ge=1, le=65536)] | None = None
    """batchSize of this stage; left out, that of `training` counts."""
    micro_batch_size: Annotated[int, Field(ge=1, le=65536)] | None = None
    """microBatchSize of this stage; left out, that of `training` counts."""
    rank: Annotated[int, Field(ge=1, le=1024)] | None = None
    """rank of this stage's adapters; left out, that of `method.lora` counts."""


class LearningRateByDepth(ApiModel):
    """A learning rate for the bottom of the decoder and one for its top."""

    bottom: LearningRate
    """bottom is the learning rate of the stage nearest to the embeddings."""
    top: LearningRate
    """top is the learning rate of the stage nearest to the head, and of a single stage."""
    interpolation: Interpolation = Interpolation.GEOMETRIC
    """interpolation between the two for the stages between them."""


class EarlyStoppingSpec(ApiModel):
    """When a stage ends before its last step; the best state is what it hands on."""

    patience: Annotated[int, Field(ge=1, le=1000)] = 2
    """patience is the number of validations in a row without improvement that end the stage."""
    min_delta: Annotated[float, Field(ge=0, le=100)] = 0.0
    """minDelta is the least fall of the validation loss that counts as improvement."""
    min_gain_per_minute: Annotated[float, Field(gt=0, le=1000)] | None = None
    """minGainPerMinute ends the stage once the validation loss fell by less than this for each
    minute of training since the validation before, in nats a token. Left out, time does not count;
    with it, how many steps are taken depends on the machine's speed.
    """


class TrainingSpec(ApiModel):
    """How a stage trains."""

    learning_rate: LearningRate | None = None
    """learningRate of every stage. Give this or `learningRateByDepth`."""
    learning_rate_by_depth: LearningRateByDepth | None = None
    """learningRateByDepth gives each stage a rate by where its layers stand in the decoder."""
    learning_rate_schedule: LearningRateSchedule = LearningRateSchedule.COSINE
    """learningRateSchedule is how the rate moves after warm-up: Cosine falls towards zero at the
    stage's last step. Every stage begins anew."""
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.03
    """warmupRatio is the part of a stage's steps in which the rate rises from zero."""
    batch_size: Annotated[int, Field(ge=1, le=65536)] = 16
    """batchSize is the number of rows in one optimizer step."""
    micro_batch_size: Annotated[int, Field(ge=1, le=65536)] = 1
    """microBatchSize is the number of rows computed at once; gradients of a batch are accumulated
    over its micro-batches. It must divide `batchSize`."""
    max_grad_norm: Annotated[float, Field(gt=0, le=1000000)] = 1.0
    """maxGradNorm is the norm to which the stage's gradients are clipped."""
    weight_decay: Annotated[float, Field(ge=0, le=10)] = 0.0
    """weightDecay of AdamW, applied to matrices and not to norms and biases."""
    optimizer: OptimizerType = OptimizerType.ADAMW
    """optimizer of every stage; its state never crosses from one stage to the next. AdamW keeps
    what trains in fp32; AdamW8bit keeps its moments in 8 bits and, where the model computes in
    BF16, what trains in BF16 with stochastic rounding."""
    optimizer_in_backward: bool = False
    """optimizerInBackward applies each parameter's update as soon as its gradient is there and
    frees the gradient, so that the gradients of a large group never stand together. A batch is then
    one micro-batch (`microBatchSize` equals `batchSize`), and gradients are clipped one by one."""
    precision: Precision = Precision.AUTO
    """precision of the computation. Auto is BF16 on a GPU and FP32 on a CPU."""
    gradient_checkpointing: GradientCheckpointing = GradientCheckpointing.ALWAYS
    """gradientCheckpointing trades about a third more computation above the frozen prefix for
    activations that take memory only at layer borders."""
    early_stopping: EarlyStoppingSpec | None = None
    """earlyStopping ends a stage when its validation loss no longer falls."""
    validations_per_epoch: Annotated[int, Field(ge=1, le=1000)] = 2
    """validationsPerEpoch is how often a stage computes its validation loss in one pass."""
    checkpoint_interval_seconds: Annotated[int, Field(ge=1, le=86400)] = 300
    """checkpointIntervalSeconds is the longest time of training that a killed process can lose."""
    prefix_cache: PrefixCache = PrefixCache.NEVER
    """prefixCache says whether the hidden states below the stage are computed once and kept."""
    seed: Annotated[int, Field(ge=0, le=2147483647)] = 42
    """seed of everything random: row order, adapters, dropout, the validation split."""


class DistillationSpec(ApiModel):
    """Keep the answers' distribution close to the base model's (knowledge distillation)."""

    weight: Weight
    """weight of the distillation loss beside the loss on answers."""
    top_k: Annotated[int, Field(ge=1, le=1024)] = 64
    """topK is the number of the base model's likeliest tokens whose probabilities are kept for each
    position; what is left counts as one more token."""


class AnchorSpec(ApiModel):
    """Keep the hidden states above the group close to the base model's."""

    weight: Weight
    """weight of the anchor: the squared distance at the group's upper border over the base model's
    own square there, token by token, mean over the tokens of a batch."""


class GeneratedTextSpec(ApiModel):
    """General text that the base model writes itself before anything is trained."""

    tokens: Annotated[int, Field(ge=64, le=1000000)] = 20000
    """tokens that are generated."""
    temperature: Annotated[float, Field(gt=0, le=10)] = 1.0
    """temperature of the sampling."""


class ReplaySpec(ApiModel):
    """Mix text of another kind into every batch: exactly one of `source` and `generated`."""

    ratio: Annotated[float, Field(gt=0, lt=1)]
    """ratio of replayed rows to `batchSize`: that many rows, at least one, are added to each batch,
    and the mean loss on their tokens is added to that on answers with this weight."""
    source: SourceUri | None = None
    """source of the text, as for `evaluation.generalText`, but not the same text: what is trained
    on measures no forgetting."""
    generated: GeneratedTextSpec | None = None
    """generated says that the base model writes the text in prepare."""
    max_tokens: Annotated[int, Field(ge=64, le=10000000)] = 100000
    """maxTokens of the source that are read; without meaning for generated text."""


class AveragingSpec(ApiModel):
    """Average base and tuned weights at export (WiSE-FT, arXiv 2109.01903)."""

    alpha: Fraction | None = None
    """alpha is the share of the tuned weights. Left out, the smallest of 0, 0.1, ..., 1 is taken
    whose validation loss is within `tolerance` of the best one's."""
    tolerance: Annotated[float, Field(ge=0, le=10)] = 0.02
    """tolerance is how much validation loss, in nats a token, may be given up for a smaller share;
    without meaning where `alpha` is given."""


class DepthScalingSpec(ApiModel):
    """Scale the change of lower layers down at export (LiNeS, arXiv 2410.17146)."""

    bottom: Fraction
    """bottom is the part of the bottommost layer's change that is kept; the topmost keeps all of
    it, those between them lie on a straight line."""


class ProtectionSpec(ApiModel):
    """What keeps the model from forgetting; docs/methods/protection.md."""

    distillation: DistillationSpec | None = None
    """distillation from the base model."""
    anchor: AnchorSpec | None = None
    """anchor on the residual stream."""
    replay: ReplaySpec | None = None
    """replay of other text."""
    averaging: AveragingSpec | None = None
    """averaging of base and tuned weights at export."""
    depth_scaling: DepthScalingSpec | None = None
    """depthScaling of the weights' change at export."""


class ResourcesSpec(ApiModel):
    """Resources of a trainer's container."""

    limits: Annotated[
        dict[Annotated[str, StringConstraints(max_length=128)], Quantity],
        Field(max_length=16),
    ] = Field(default_factory=dict)
    """limits by resource name, as in a container: nvidia.com/gpu, memory, cpu."""
    requests: Annotated[
        dict[Annotated[str, StringConstraints(max_length=128)], Quantity],
        Field(max_length=16),
    ] = Field(default_factory=dict)
    """requests by resource name. Left out, Kubernetes takes the limits for them."""


class TolerationOperator(StrEnum):
    """How a toleration is compared with a taint."""

    EXISTS = "Exists"
    EQUAL = "Equal"


class TaintEffect(StrEnum):
    """What a taint does to pods that do not tolerate it."""

    NO_SCHEDULE = "NoSchedule"
    PREFER_NO_SCHEDULE = "PreferNoSchedule"
    NO_EXECUTE = "NoExecute"


class TolerationSpec(ApiModel):
    """A taint that the run's pods tolerate, as in a pod."""

    key: LabelKey | None = None
    """key of the taint. Left out, with operator Exists, every taint is tolerated."""
    operator: TolerationOperator = TolerationOperator.EQUAL
    """operator says how `value` is compared."""
    value: LabelValue | None = None
    """value of the taint; only with operator Equal."""
    effect: TaintEffect | None = None
    """effect of the taint. Left out, every effect is tolerated."""
    toleration_seconds: Annotated[int, Field(ge=0, le=86400)] | None = None
    """tolerationSeconds for which a pod stays on a node with such a taint; only with NoExecute."""


class RuntimeSpec(ApiModel):
    """How pods are run on a cluster; without meaning on one machine."""

    resources: ResourcesSpec | None = None
    """resources of the containers that train and evaluate. Those that prepare and export get the
    same without extended resources such as nvidia.com/gpu: no GPU waits for a download."""
    queue_name: LabelValue | None = None
    """queueName of the Kueue LocalQueue that admits the run's Jobs, one by one."""
    priority_class_name: ObjectName | None = None
    """priorityClassName of the run's pods."""
    node_selector: Annotated[dict[LabelKey, LabelValue], Field(max_length=16)] | None = None
    """nodeSelector of the run's pods."""
    tolerations: Annotated[list[TolerationSpec], Field(max_length=16)] | None = None
    """tolerations of the run's pods."""
    max_retries: Annotated[int, Field(ge=0, le=100)] = 3
    """maxRetries of each task after failures that another attempt may not repeat. Disruptions such
    as preemption and drained nodes do not count, mistakes in the manifest or data are not retried.
    """
    grace_period_seconds: Annotated[int, Field(ge=10, le=3600)] = 120
    """gracePeriodSeconds that a pod which is asked to leave has for finishing its step and
    saving."""
    engine: EngineType = EngineType.AUTO
    """engine that runs the backward pass and the optimizer."""


class AccessMode(StrEnum):
    """How the volume of a run can be mounted."""

    READ_WRITE_ONCE = "ReadWriteOnce"
    READ_WRITE_MANY = "ReadWriteMany"


class StorageSpec(ApiModel):
    """The volume of a run on a cluster: exactly one of `size` and `claimName`."""

    size: (
        Annotated[str, StringConstraints(max_length=32, pattern=r"^[0-9]+(Ki|Mi|Gi|Ti)$")] | None
    ) = None
    """size of the claim that is made for the run, such as 100Gi."""
    storage_class_name: ObjectName | None = None
    """storageClassName of the claim that is made. Left out, the cluster's default counts."""
    access_mode: AccessMode = AccessMode.READ_WRITE_ONCE
    """accessMode of the claim that is made."""
    claim_name: ObjectName | None = None
    """claimName of a PersistentVolumeClaim that is there already, in the run's namespace."""
    models_claim_name: ObjectName | None = None
    """modelsClaimName of a claim for base models that several runs share. Prepare puts a model
    there once; every other pod mounts it read-only. Left out, base models lie on the run's volume.
    """
    retain: RetainPolicy = RetainPolicy.RESULT
    """retain says what stays. Result removes checkpoints and tokenised rows once the run has
    succeeded; Everything keeps them; both keep the claim when the run is deleted. Nothing deletes
    the claim that was made together with the run."""


class RetrySpec(ApiModel):
    """An order to begin a failed or finished run again."""

    number: Annotated[int, Field(ge=1, le=10000)]
    """number of the order: raise it to give another one. What stands here stays without effect
    until the number rises, so the manifest can lie in Git as it is."""
    from_stage: Annotated[str, StringConstraints(min_length=1, max_length=64)] | None = None
    """fromStage is the first stage that is trained again; all after it follow. Left out, a failed
    run goes on with what failed."""


class ExactMatchSpec(ApiModel):
    """Greedy answers to validation questions, compared with the reference answers."""

    max_rows: Annotated[int, Field(ge=1, le=100000)] = 200
    """maxRows is the number of validation rows that are answered, from the first."""
    max_new_tokens: Annotated[int, Field(ge=1, le=4096)] = 64
    """maxNewTokens is the longest answer that is generated."""


class GeneralTextSpec(ApiModel):
    """Text that was not trained on: how much its loss rises is how much was forgotten."""

    source: SourceUri
    """source of the text: a JSONL file with a `text` column, or a plain text file with a blank line
    between passages."""
    max_tokens: Annotated[int, Field(ge=64, le=10000000)] = 20000
    """maxTokens of text that are read."""


class EvaluationSpec(ApiModel):
    """What is measured before and after, on the base model and on the exported one.

    Validation loss and the divergence from the base (KL) are always measured.
    """

    exact_match: ExactMatchSpec | None = None
    """exactMatch scores greedy answers to the validation questions."""
    general_text: GeneralTextSpec | None = None
    """generalText measures the loss on text that was not trained on."""
    samples: Annotated[int, Field(ge=0, le=20)] = 3
    """samples is the number of validation answers shown before and after."""


class ExportSpec(ApiModel):
    """What the finished run leaves for others to load."""

    format: ExportFormat = ExportFormat.MERGED
    """format of the result: Merged is an ordinary Hugging Face folder, Adapter a PEFT folder."""
    dtype: ExportDtype = ExportDtype.AUTO
    """dtype of exported weights; Auto keeps that of the base model."""


class ServeSpec(ApiModel):
    """How the result is served."""

    replicas: Annotated[int, Field(ge=0, le=64)] = 1
    """replicas of the server."""


class StagedFineTuneSpec(ApiModel):
    """What is trained, on what, in which stages, and what is left at the end."""

    model: ModelSpec
    """model that the run starts from."""
    dataset: DatasetSpec
    """dataset that the model is tuned on."""
    method: MethodSpec = MethodSpec()
    """method says what trains inside a stage."""
    schedule: ScheduleSpec | None = None
    """schedule cuts the decoder into stages by rule. Give this or `stages`."""
    stages: Annotated[list[ExplicitStageSpec], Field(min_length=1, max_length=128)] | None = None
    """stages lists the stages one by one, in the order in which they run."""
    training: TrainingSpec = TrainingSpec()
    """training says how a stage trains."""
    protection: ProtectionSpec | None = None
    """protection keeps what the model knew before."""
    runtime: RuntimeSpec | None = None
    """runtime says how pods are run on a cluster."""
    storage: StorageSpec | None = None
    """storage is the run's volume on a cluster."""
    evaluation: EvaluationSpec = EvaluationSpec()
    """evaluation says what is measured before and after."""
    export: ExportSpec = ExportSpec()
    """export says what the run leaves for others to load."""
    serve: ServeSpec | None = None
    """serve says how the result is served."""
    suspend: bool = False
    """suspend stops the run after saving; false lets it go on."""
    retry: RetrySpec | None = None
    """retry begins a failed run again, or a finished one from a stage."""

    @property
    def gradient_profile(self) -> GradientNormSpec | None:
        """What prepare measures for order GradientNorm; None for every other order."""
        if self.schedule is None or self.schedule.order is not Order.GRADIENT_NORM:
            return None
        return self.schedule.gradient_norm or GradientNormSpec()


class ObjectMeta(ApiModel):
    """The part of Kubernetes' object metadata that a run reads."""

    # A live object carries many more keys here, all of them the API server's business.
    model_config = ConfigDict(extra="ignore")

    name: Annotated[
        str,
        StringConstraints(
            min_length=1, max_length=names.RUN_NAME_MAX_LENGTH, pattern=names.DNS_LABEL_PATTERN
        ),
    ]
    """name of the run."""
    namespace: Annotated[str, StringConstraints(max_length=63)] | None = None
    """namespace of the run on a cluster."""


class StagedFineTune(ApiModel):
    """A run: a model tuned in stages, each opening a few decoder layers."""

    api_version: Literal["stagetune.io/v1alpha1"]
    """apiVersion of this manifest."""
    kind: Literal["StagedFineTune"]
    """kind of this manifest."""
    metadata: ObjectMeta
    """metadata names the run."""
    spec: StagedFineTuneSpec
    """spec is what the user asks for."""
