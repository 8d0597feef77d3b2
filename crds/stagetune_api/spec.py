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
from stagetune_api.field_types import Fraction, SourceUri
from stagetune_api.training_spec import (
    ExplicitStageSpec,
    GradientNormSpec,
    MethodSpec,
    Order,
    ProtectionSpec,
    ScheduleSpec,
    TrainingSpec,
)

ObjectName = Annotated[
    str,
    StringConstraints(min_length=1, max_length=253, pattern=r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$"),
]
ColumnName = Annotated[str, StringConstraints(min_length=1, max_length=128)]
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


class EngineType(StrEnum):
    """What runs the backward pass and the optimizer."""

    AUTO = "Auto"
    SINGLE = "Single"
    DEEPSPEED = "DeepSpeed"


class Offload(StrEnum):
    """What DeepSpeed keeps in host memory."""

    NONE = "None"
    OPTIMIZER = "Optimizer"
    OPTIMIZER_AND_PARAMETERS = "OptimizerAndParameters"


class Standby(StrEnum):
    """When the next task's process is started before it is due."""

    AUTO = "Auto"
    ALWAYS = "Always"
    NEVER = "Never"


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


class DeepSpeedSpec(ApiModel):
    """What several processes of a stage divide among them (ZeRO, arXiv 1910.02054)."""

    zero_stage: Annotated[int, Field(ge=2, le=3)] = 2
    """zeroStage 2 divides gradients and optimizer states; 3 also the weights of decoder layers,
    which are then sent anew for every pass."""
    offload: Offload = Offload.NONE
    """offload says what is kept in host memory: None, Optimizer (fp32 masters and the optimizer's
    states, which are then updated by the CPU), or with zeroStage 3 OptimizerAndParameters."""


class RuntimeSpec(ApiModel):
    """How pods are run on a cluster, and in how many processes a stage trains.

    On one machine only `engine`, `processesPerNode`, `deepspeed` and `standby` count.
    """

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
    """engine that runs the backward pass and the optimizer. Auto is DeepSpeed where a stage has
    several processes or `deepspeed` is given, and Single otherwise."""
    processes_per_node: Annotated[int, Field(ge=1, le=64)] | None = None
    """processesPerNode that train a stage together, each on a GPU of its own where there are GPUs.
    Left out, it is the number of GPUs in `resources.limits`, and 1 where there are none, on one
    machine, or with engine Single."""
    nodes: Annotated[int, Field(ge=1, le=64)] = 1
    """nodes is the number of pods that train a stage together, with `resources` each. Where they
    are on several nodes the volume has to be one that all of them can mount."""
    deepspeed: DeepSpeedSpec | None = None
    """deepspeed holds the options of that engine."""
    standby: Standby = Standby.AUTO
    """standby says whether the next task's pod is started in the last minute of a stage, on the
    same node, and waits with its code imported and the base model checked. Auto does so where pods
    take no GPU; Always also where they do, so that two are held for that minute; Never waits for
    the end of a stage. No pod stands by where a queue admits Jobs, with priorityClassName, or where
    stages have several processes."""


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
    """schedule cuts the decoder into stages by rule. Where `stages` is left out too, it is the
    schedule of all defaults."""
    stages: Annotated[list[ExplicitStageSpec], Field(min_length=1, max_length=128)] | None = None
    """stages lists the stages one by one, in the order in which they run; instead of `schedule`."""
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
    def schedule_in_use(self) -> ScheduleSpec | None:
        """The schedule that cuts the decoder; None where the stages are listed."""
        if self.stages is not None:
            return None
        return self.schedule or ScheduleSpec()

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
