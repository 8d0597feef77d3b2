"""The manifest's sections on what is trained and how: method, stages, training, protection.

A part of `spec`, whose words on types and rules count here too.
"""

from enum import StrEnum
from typing import Annotated

from pydantic import Field, StringConstraints

from stagetune_api import names
from stagetune_api.base import ApiModel
from stagetune_api.field_types import Fraction, SourceUri

LearningRate = Annotated[float, Field(gt=0, le=1)]
Weight = Annotated[float, Field(ge=0, le=1000)]
DEFAULT_STAGE_COUNT = 2
"""Stages of a schedule that says nothing of their number; docs/quality.md has the reason."""
DEFAULT_EPOCHS = 1.25
"""Passes of each of these stages."""


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
    """How the decoder is cut into stages.

    What is left out is what won in docs/quality.md: two stages, from the bottom up.
    """

    layers_per_stage: Annotated[int, Field(ge=1, le=1024)] | None = None
    """layersPerStage is the number of decoder layers a stage opens. Where the model's depth does
    not divide evenly, the stage at the top is the smaller one. Give this or `stageCount`."""
    stage_count: Annotated[int, Field(ge=1, le=128)] | None = None
    """stageCount is the number of stages; layers are spread evenly, larger groups at the bottom.
    Where `layersPerStage` is left out too, it is 2."""
    order: Order = Order.BOTTOM_UP
    """order in which the groups are opened."""
    head: HeadPolicy = HeadPolicy.NEVER
    """head says whether the stage with the topmost layers also trains the final norm and the
    language-model head. Refused for models whose head is tied to the embeddings."""
    embeddings: EmbeddingsPolicy = EmbeddingsPolicy.NEVER
    """embeddings says whether the stage with the bottommost layers also trains the input
    embeddings."""
    epochs_per_stage: Annotated[float, Field(gt=0, le=1000)] | None = None
    """epochsPerStage is the number of passes a stage makes over its rows. Left out, it is 1; 1.25
    where neither `layersPerStage` nor `stageCount` is given."""
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

    @property
    def count(self) -> int | None:
        """The number of groups; None where `layersPerStage` and the model's depth give it."""
        return DEFAULT_STAGE_COUNT if self._is_cut_by_default else self.stage_count

    @property
    def epochs(self) -> float:
        """The passes of a stage over its rows."""
        if self.epochs_per_stage is not None:
            return self.epochs_per_stage
        return DEFAULT_EPOCHS if self._is_cut_by_default else 1.0

    def without_implied(self) -> "ScheduleSpec":
        """Return the same schedule without what would be the same if it were left out.

        Older versions wrote every default down.
        """
        without = self.model_copy(update={"epochs_per_stage": None})
        return without if without.epochs == self.epochs else self

    @property
    def _is_cut_by_default(self) -> bool:
        return self.layers_per_stage is None and self.stage_count is None


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
    group_by_length: bool = False
    """groupByLength makes batches of rows of like length, so that less padding is computed; how
    much there is, is measured (`paddingFraction`). Which rows share a batch is then no longer by
    chance alone."""
    packing: bool = False
    """packing puts several rows of a batch into one sequence, as long as the longest row of the
    data at most, so that next to no padding is computed. Rows do not see each other, and a batch
    has the same rows and the same gradient within rounding. `microBatchSize` then counts sequences.
    """
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
    prefix_cache: PrefixCache = PrefixCache.AUTO
    """prefixCache says whether the hidden states below the stage are computed once and kept on the
    volume. Auto decides for each stage by the work that they save and the disk that they take; the
    plan says what it decided. They change no bit of the result on a CPU and nothing but rounding on
    a GPU."""
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

    def rows_per_step(self, batch_size: int) -> int:
        """Return how many rows are added to each batch: the nearest number, and at least one."""
        return max(1, round(self.ratio * batch_size))


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
