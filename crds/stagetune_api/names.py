"""Names that more than one program must agree on: the only home of such strings."""

from enum import IntEnum
from pathlib import Path

GROUP = "stagetune.io"
VERSION = "v1alpha1"
API_VERSION = f"{GROUP}/{VERSION}"
KIND = "StagedFineTune"
PLURAL = "stagedfinetunes"
SINGULAR = "stagedfinetune"
SHORT_NAME = "sft"
CATEGORY = "finetuning"

RUN_NAME_MAX_LENGTH = 40
"""Longest run name: Job names are `<run>-<NN>-<stage>` and must stay within 63 characters."""
STAGE_NAME_MAX_LENGTH = 16
MAX_STAGES = 128
"""Stages of a run at most."""
DNS_LABEL_PATTERN = r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"

LABEL_RUN = f"{GROUP}/run"
"""Label of everything that belongs to a run: its name."""
LABEL_TASK = f"{GROUP}/task"
"""Label of Jobs and pods: `prepare`, `evaluate`, `export`, or the stage's folder, `01-layers-0-7`.
"""
LABEL_ATTEMPT = f"{GROUP}/attempt"
"""Label of Jobs and pods: which Job for the task it is, from 1."""
LABEL_MANAGED_BY = "app.kubernetes.io/managed-by"
MANAGED_BY = "stagetune"
LABEL_QUEUE = "kueue.x-k8s.io/queue-name"
ANNOTATION_STAGE_CONFIG = f"{GROUP}/stage-config"
"""Annotation of a pod: its StageConfig as JSON, which the pod reads as a file."""
ANNOTATION_CONFIG_DIGEST = f"{GROUP}/config-digest"
"""Annotation of a Job: digest of the StageConfig, by which the operator knows its own again."""
ANNOTATION_FORECAST_DIGEST = f"{GROUP}/forecast-digest"
"""Annotation of a Job that was made before its task was due: digest of its pods' template, with the
StageConfig as far as it was known then. Its pod stands by until it is given the whole."""
ANNOTATION_INPUTS = f"{GROUP}/inputs"
"""Annotation of a Job: the Jobs whose results it goes on from, as JSON by task."""
ANNOTATION_MICRO_BATCH_SIZE = f"{GROUP}/micro-batch-size"
"""Annotation of a Job: the micro-batch size its task is done with."""
ANNOTATION_RUN_UID = f"{GROUP}/run-uid"
"""Annotation of a claim that outlives its run: the run that it was made for."""

PREPARE_TASK, EVALUATE_TASK, EXPORT_TASK = "prepare", "evaluate", "export"
TRAINER_CONTAINER = "trainer"
TASK_MOUNT = "/etc/stagetune/task"
SECRETS_MOUNT = "/etc/stagetune/secrets"
"""Where tokens lie in a pod: `model/token` and `dataset/token`."""
TOKEN_KEY = "token"
"""Key of a hub token in its Secret, and the name of its file."""
PROGRESS_TOKEN_MOUNT = "/var/run/secrets/stagetune.io"
VOLUME_MOUNT = "/stagetune"
"""Where the run's volume is mounted: `runs/<directory>` and `models` below it."""
MODELS_MOUNT = "/stagetune-models"
CLAIMS_MOUNT = "/stagetune-claims"
SECRETS_DIRECTORY_VARIABLE = "STAGETUNE_SECRETS_DIRECTORY"

PROGRESS_URL_VARIABLE = "KUBEFLOW_TRAINER_SERVER_URL"
"""Kubeflow's names, so that a Hugging Face Trainer reports without a change of its code."""
PROGRESS_CA_VARIABLE = "KUBEFLOW_TRAINER_SERVER_CA_CERT"
PROGRESS_TOKEN_VARIABLE = "KUBEFLOW_TRAINER_SERVER_TOKEN"
PROGRESS_AUDIENCE = f"progress.{GROUP}"
PROGRESS_INTERVAL_SECONDS = 5.0
PROGRESS_MAX_BYTES = 65536
COORDINATOR_VARIABLE = "STAGETUNE_COORDINATOR"
"""In pods of a stage that has several: the name by which they find the first one."""
POD_INDEX_VARIABLE = "JOB_COMPLETION_INDEX"
"""Kubernetes' own, in the pods of an Indexed Job: which of them it is, from 0."""
LABEL_POD_INDEX = "batch.kubernetes.io/job-completion-index"
"""Kubernetes' own label of the pods of an Indexed Job."""
COORDINATOR_PORT = 29400
TRAINER_METRICS_PORT = 9108
OPERATOR_PROGRESS_PORT = 8080
OPERATOR_METRICS_PORT = 9109
OPERATOR_HEALTH_PORT = 8081

FACTS_FILE = "facts.json"
DATA_REPORT_FILE = "data-report.json"
MANIFEST_FILE = "manifest.json"
REPORT_FILE = "report.json"
STATUS_FILE = "status.json"
PLAN_FILE = "plan.json"
RUN_MANIFEST_FILE = "run.json"
STAGE_CONFIG_FILE = "stage.json"
STAGE_FORECAST_FILE = "forecast.json"
METRICS_FILE = "metrics.jsonl"
LOG_FILE = "log.txt"
LOCK_FILE = "lock"
WEIGHTS_FILE = "model.safetensors"
ADAPTER_WEIGHTS_FILE = "adapter_model.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"
LOOP_STATE_FILE = "loop.json"
RANDOM_STATE_FILE = "random.safetensors"
TEACHER_FILE = "teacher.safetensors"
HIDDEN_STATES_FILE = "hidden.safetensors"
BEST_WEIGHTS_FILE = "best.safetensors"

TERMINATION_MESSAGE_MAX_BYTES = 4096
"""The kubelet keeps no more than this of a container's termination message."""


class ExitCode(IntEnum):
    """Exit codes of `stagetune`; documented in docs/command-line.md."""

    DONE = 0
    INVALID = 2
    FAILED = 3
    INTERRUPTED = 130


class TrainerExitCode(IntEnum):
    """Exit codes of a trainer process, one per failure class that must be told apart from outside.

    They stay clear of 1, 2 and 126-255, which the interpreter, the shell and signals use.
    """

    SUCCEEDED = 0
    USER_ERROR = 40
    OUT_OF_MEMORY = 41
    DIVERGED = 42
    STORAGE_FULL = 43
    STORAGE_ERROR = 44
    INTERRUPTED = 45
    FENCED = 46
    INTERNAL = 47


class RunLayout:
    """Where everything of one run lies on its volume (docs/architecture.md, "The volume")."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.prepare = root / "prepare"
        self.data = self.prepare / "data"
        self.facts = self.prepare / FACTS_FILE
        self.data_report = self.prepare / DATA_REPORT_FILE
        self.stages = root / "stages"
        self.tasks = root / "tasks"
        self.export = root / "export"
        self.cache = root / "cache"
        self.status = root / STATUS_FILE
        self.plan = root / PLAN_FILE
        self.lock = root / LOCK_FILE
        self.run_report = root / REPORT_FILE

    def stage(self, directory: str) -> "StageLayout":
        """Return the layout of the stage in `stages/<directory>`, e.g. `01-layers-0-7`."""
        return StageLayout(self.stages / directory)

    def task(self, name: str) -> "StageLayout":
        """Return the layout of the records of a task that is no stage, e.g. `prepare`."""
        return StageLayout(self.tasks / name)


class StageLayout:
    """Where one stage keeps its checkpoints, its output and its records."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.checkpoints = root / "checkpoints"
        self.output = root / "output"
        self.anchor = root / "anchor"
        self.metrics = root / METRICS_FILE
        self.report = root / REPORT_FILE
        self.fence = root / "fence"
        self.log = root / LOG_FILE
        self.config = root / STAGE_CONFIG_FILE
        self.forecast = root / STAGE_FORECAST_FILE


def newest_attempt(fence: Path) -> int:
    """Return the number of the newest attempt that claimed the folder `fence`; 0 before any did."""
    if not fence.is_dir():
        return 0
    return max((int(path.name) for path in fence.iterdir() if path.name.isdigit()), default=0)


def checkpoint_directory_name(step: int) -> str:
    """Return the name of the checkpoint folder after `step` optimizer steps."""
    return f"step-{step:06d}"
