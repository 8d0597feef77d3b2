"""What says what is trained, in all its pairs: the rules and the validator refuse the same.

Every value is sound by itself, so what is refused is refused for what stands beside it.
"""

import itertools
from collections.abc import Callable
from typing import Any

from manifest_cases import LOWER, UPPER
from stagetune_api.problems import ProblemReason
from stagetune_api.rules import RULES
from stagetune_api.structural import Node
from stagetune_api.validation import parse_manifest

LORA = {"spec.method.type": "LoRA"}
BY_GRADIENT = {"spec.schedule.order": "GradientNorm"}
WHOLE = {"spec.training.batchSize": 4, "spec.training.microBatchSize": 4}
VALUES: dict[str, dict[str, Any]] = {
    "LoRA": LORA,
    "DoRA": {**LORA, "spec.method.lora.dora": True},
    "PerStage": {**LORA, "spec.method.lora.adapters": "PerStage"},
    "QLoRA": {"spec.method.type": "QLoRA"},
    "QLoRA-DoRA": {"spec.method.type": "QLoRA", "spec.method.lora.dora": True},
    "Expand": {"spec.method.type": "Expand"},
    "Expand-2": {"spec.method": {"type": "Expand", "expand": {"layersPerBlock": 2}}},
    "Adapter": {**LORA, "spec.export.format": "Adapter"},
    "rates": {
        "spec.training.learningRate": None,
        "spec.training.learningRateByDepth": {"bottom": 1e-5, "top": 1e-4},
    },
    "micro-batch": {"spec.training.microBatchSize": 4},
    "8-bit": {"spec.training.optimizer": "AdamW8bit"},
    "in-backward": {**WHOLE, "spec.training.optimizerInBackward": True},
    "stageCount": {"spec.schedule.layersPerStage": None, "spec.schedule.stageCount": 64},
    "top-down": {"spec.schedule.order": "TopDown"},
    "by-gradient": BY_GRADIENT,
    "gradientNorm": {**BY_GRADIENT, "spec.schedule.gradientNorm": {"batches": 2}},
    "head": {"spec.schedule.head": "LastStage"},
    "embeddings": {"spec.schedule.embeddings": "FirstStage"},
    "openTop": {"spec.schedule.openTop": 2},
    "cumulative": {"spec.schedule.cumulative": True},
    "overlap": {"spec.schedule.overlap": 1},
    "passes": {"spec.schedule.passes": 3},
    "disjoint": {"spec.schedule.dataPartition": "Disjoint", "spec.schedule.dataFraction": 0.01},
    "stage-rate": {"stage.learningRate": 1e-4},
    "stage-head": {"stage.head": True},
    "stage-openTop": {"stage.openTop": 2},
    "stage-half": {"stage.dataFraction": 0.5},
    "stage-offset": {"stage.dataFraction": 0.5, "stage.dataOffset": 0.5},
    "stage-batch": {"stage.batchSize": 6},
    "stage-micro-batch": {"stage.microBatchSize": 2},
    "stage-rank": {**LORA, "stage.rank": 4},
    "distillation": {"spec.protection.distillation": {"weight": 0}},
    "anchor": {"spec.protection.anchor": {"weight": 1}},
    "replay": {"spec.protection.replay": {"ratio": 0.1, "source": "hf://org/text"}},
    "generated": {"spec.protection.replay": {"ratio": 0.1, "generated": {}}},
    "averaging": {"spec.protection.averaging": {}},
    "depthScaling": {"spec.protection.depthScaling": {"bottom": 0.5}},
    "generalText": {"spec.evaluation.generalText": {"source": "hf://org/text"}},
}
MESSAGES = {rule.message: f"{rule.path}{rule.field_path}" for rule in RULES}


def edits_of(*values: str) -> dict[str, Any]:
    """Return the edits of `values` together; those of a stage give two explicit stages."""
    together = {path: value for name in values for path, value in VALUES[name].items()}
    stage = {path: together.pop(path) for path in list(together) if path.startswith("stage.")}
    if stage:
        own = {path.removeprefix("stage."): value for path, value in stage.items()}
        # At the front: what stands in a schedule gives one beside the stages.
        together = {"spec.schedule": None, "spec.stages": [LOWER, {**UPPER, **own}], **together}
    return together


def section(path: str) -> str:
    """Return the section that a path is in: `spec.stages[1].openTop` is in `stages`."""
    return path.split(".")[1].partition("[")[0]


def test_rules_and_validator_refuse_the_same_pairs(
    server: Any, manifest: Callable[..., Node]
) -> None:
    differing, refused = [], set()
    for pair in itertools.combinations_with_replacement(VALUES, 2):
        document = manifest(edits_of(*pair))
        rules = {section(MESSAGES[message]) for message in server.refusals(document)}
        parsed = parse_manifest(document)
        problems = parsed if isinstance(parsed, list) else []
        assert {problem.reason for problem in problems} <= {ProblemReason.CONFLICT}, pair
        if rules != {section(problem.path) for problem in problems}:
            differing.append((pair, rules, problems))
        elif rules:
            refused.add(pair)
    assert differing == []
    assert not [pair for pair in refused if pair[0] == pair[1]], "a value is not sound by itself"
    assert len(refused) > 50
