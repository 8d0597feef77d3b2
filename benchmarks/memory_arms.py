"""What benchmarks/memory.py measures: arms, each a change of one manifest."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from quality_arms import CHAT_TEMPLATE
from trainer_tasks import edited

FULL = "full"
"""The arm that resident memory is compared with."""

MANIFEST: dict[str, Any] = {
    "apiVersion": "stagetune.io/v1alpha1",
    "kind": "StagedFineTune",
    "metadata": {"name": "memory"},
    "spec": {
        "model": {"source": "file://model.gguf", "chatTemplate": CHAT_TEMPLATE},
        "dataset": {
            "source": "file://train.jsonl",
            "validation": {"source": "file://validation.jsonl"},
            "maxLength": 128,
        },
        "schedule": {"epochsPerStage": 1.5},
        "training": {
            "learningRate": 1e-4,
            "batchSize": 8,
            "microBatchSize": 8,
            "gradientCheckpointing": "Never",
            "earlyStopping": {"patience": 9},
        },
        "evaluation": {"generalText": {"source": "file://general_text.jsonl", "maxTokens": 800}},
    },
}


@dataclass(frozen=True, kw_only=True)
class Arm:
    """A way of training."""

    name: str
    title: str
    """What the table calls it."""
    edits: Mapping[str, Any]
    """Values by path below `spec`, dots between the parts."""

    def manifest(self) -> dict[str, Any]:
        """Return the arm's manifest."""
        document = edited(MANIFEST, self.edits)
        if "stages" in document["spec"]:
            del document["spec"]["schedule"]
        return document


_THREE = {"schedule.stageCount": 3}
_LORA = {"method": {"type": "LoRA", "lora": {"rank": 16}}}

ARMS = (
    Arm(
        name=FULL,
        title="full fine-tuning",
        edits={"schedule.stageCount": 1, "schedule.embeddings": "FirstStage"},
    ),
    Arm(name="default", title="two stages, as by default", edits={}),
    Arm(name="three", title="three stages", edits=_THREE),
    Arm(
        name="uncached",
        title="two stages without a prefix cache",
        edits={"training.prefixCache": "Never"},
    ),
    Arm(
        name="checkpointed",
        title="two stages, gradient checkpointing",
        edits={"training.gradientCheckpointing": "Always"},
    ),
    Arm(
        name="micro-batch-1",
        title="two stages, micro-batches of one row",
        edits={"training.microBatchSize": 1},
    ),
    Arm(
        name="adamw-8bit",
        title="two stages, AdamW8bit",
        edits={"training.optimizer": "AdamW8bit"},
    ),
    Arm(
        name="in-backward",
        title="two stages, optimizer in the backward pass",
        edits={"training.optimizerInBackward": True},
    ),
    Arm(
        name="distilled",
        title="two stages, distillation",
        edits={"protection.distillation": {"weight": 0.1}},
    ),
    Arm(name="lora", title="two stages, LoRA", edits=_LORA),
    Arm(
        name="qlora",
        title="two stages, QLoRA",
        edits={"method": {"type": "QLoRA", "lora": {"rank": 16}}},
    ),
    Arm(
        name="expand",
        title="two stages, Expand",
        edits={"method": {"type": "Expand", "expand": {"layersPerBlock": 5}}},
    ),
    Arm(
        name="top",
        title="two stages of three layers at the top",
        edits={
            "stages": [
                {"name": "below", "layers": {"first": 24, "last": 26}, "epochs": 1.5},
                {"name": "top", "layers": {"first": 27, "last": 29}, "epochs": 1.5},
            ]
        },
    ),
)
