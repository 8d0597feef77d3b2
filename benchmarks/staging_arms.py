"""What benchmarks/staging.py compares: full fine-tuning, LoRA, ms-swift, and stages of ours."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

# The same rows have to be the same tokens in every program, whatever its templates add.
from quality_arms import CHAT_TEMPLATE

REFERENCE = "full"
"""The arm that all others are held against."""
NUM_STAGES = 3
TOP_SHARE = 10
"""A top stage has a tenth of the layers."""

SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
"""The system prompt that the model's own template writes; here every row says it itself."""
LEARNING_RATE = 1e-4
BATCH_SIZE = 8
MAX_LENGTH = 128


@dataclass(frozen=True, kw_only=True)
class Arm:
    """A way of training, measured as one or more processes after each other."""

    name: str
    title: str
    program: Literal["plain", "stagetune", "ms-swift"]
    rank: int | None = None
    """Of LoRA's adapters; None trains the weights themselves."""
    positions: Literal["all", "answers"] = "answers"
    """Where a plain arm computes logits."""
    stages: Literal["thirds", "small", "top", "top alone", "default"] | None = None
    """How the decoder is cut; None for all of it at once."""
    cached: bool = False

    def spec_edits(self, num_layers: int) -> dict[str, Any]:
        """Return what the arm's manifest says of its stages, below `spec`."""
        size = top_size(num_layers)
        top = {"name": "top", "layers": {"first": num_layers - size, "last": num_layers - 1}}
        below = {
            "name": "below-top",
            "layers": {"first": num_layers - 2 * size, "last": num_layers - size - 1},
        }
        by_cut: Mapping[str, dict[str, Any]] = {
            "thirds": {"schedule": {"stageCount": NUM_STAGES, "epochsPerStage": 1}},
            "small": {
                "schedule": {"stageCount": num_small_stages(num_layers), "epochsPerStage": 1}
            },
            "top": {"stages": [below, top]},
            "top alone": {"stages": [top]},
            "default": {},
        }
        return by_cut[self.stages or "default"]


def top_size(num_layers: int) -> int:
    """Return the number of layers of a top stage."""
    return max(1, num_layers // TOP_SHARE)


def num_small_stages(num_layers: int) -> int:
    """Return how many stages there are when all are as small as a top stage."""
    return num_layers // top_size(num_layers)


_EVERYWHERE = ", logits everywhere"

ARMS = (
    Arm(name="full", title="full fine-tuning", program="plain"),
    Arm(
        name="stages-cached",
        title="3 stages, cached",
        program="stagetune",
        stages="thirds",
        cached=True,
    ),
    Arm(name="lora16", title="LoRA r=16", program="plain", rank=16),
    Arm(
        name="top-cached", title="top stage, cached", program="stagetune", stages="top", cached=True
    ),
    Arm(
        name="swift-stages", title="ms-swift, 3 stages by hand", program="ms-swift", stages="thirds"
    ),
    Arm(name="stages-uncached", title="3 stages, uncached", program="stagetune", stages="thirds"),
    Arm(
        name="default",
        title="the default: 2 stages, cached",
        program="stagetune",
        stages="default",
        cached=True,
    ),
    Arm(
        name="small-cached",
        title="10 stages of a tenth, cached",
        program="stagetune",
        stages="small",
        cached=True,
    ),
    Arm(name="full-all", title="full fine-tuning" + _EVERYWHERE, program="plain", positions="all"),
    Arm(
        name="lora16-all",
        title="LoRA r=16" + _EVERYWHERE,
        program="plain",
        rank=16,
        positions="all",
    ),
    Arm(name="swift-lora16", title="ms-swift, LoRA r=16", program="ms-swift", rank=16),
    Arm(name="top-uncached", title="top stage, uncached", program="stagetune", stages="top alone"),
    Arm(name="lora64", title="LoRA r=64", program="plain", rank=64),
    Arm(
        name="lora64-all",
        title="LoRA r=64" + _EVERYWHERE,
        program="plain",
        rank=64,
        positions="all",
    ),
    Arm(name="swift-full", title="ms-swift, full fine-tuning", program="ms-swift"),
)
"""In the order in which a round runs them: what is compared most stands close together."""


def manifest(arm: Arm, num_layers: int, model_source: str) -> dict[str, Any]:
    """Return the manifest of an arm of ours, for a model of `num_layers` decoder layers."""
    return {
        "apiVersion": "stagetune.io/v1alpha1",
        "kind": "StagedFineTune",
        "metadata": {"name": "staging"},
        "spec": {
            "model": {"source": model_source, "chatTemplate": CHAT_TEMPLATE},
            "dataset": {
                "source": "file://train.jsonl",
                "validation": {"source": "file://validation.jsonl"},
                "maxLength": MAX_LENGTH,
            },
            "training": {
                "learningRate": LEARNING_RATE,
                "batchSize": BATCH_SIZE,
                "microBatchSize": BATCH_SIZE,
                "gradientCheckpointing": "Never",
                "precision": "FP32",
                "prefixCache": "Auto" if arm.cached else "Never",
            },
            **arm.spec_edits(num_layers),
        },
    }
