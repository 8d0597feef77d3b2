"""Manifests on both sides of every rule, for a reading of the CRD and for a real API server."""

import copy
from collections.abc import Mapping
from typing import Any, NamedTuple

from ruamel.yaml import YAML

from stagetune_api.structural import Node

Edits = Mapping[str, Any]
"""Values by path, as `spec.training.batchSize`; None takes the field away."""

MANIFEST = """
apiVersion: stagetune.io/v1alpha1
kind: StagedFineTune
metadata:
  name: finance-qa
  namespace: team-a
  uid: 0c4a3e62-5d8f-4c9a-9a52-0d8f7c1d9a11
spec:
  model:
    source: hf://Qwen/Qwen2.5-7B-Instruct
  dataset:
    source: file://finance.jsonl
    validation:
      fraction: 0.05
  schedule:
    layersPerStage: 4
  training:
    learningRate: 1e-4
"""


def edited(edits: Edits | None = None) -> Node:
    """Return the sound manifest with edits by path; None takes a field away."""
    document: Node = YAML(typ="safe").load(MANIFEST)
    for path, value in (edits or {}).items():
        *parents, last = path.split(".")
        place = document
        for part in parents:
            place = place.setdefault(part, {})
        if value is None:
            place.pop(last, None)
        else:
            place[last] = copy.deepcopy(value)
    return document


LOWER = {"name": "lower", "layers": {"first": 0, "last": 3}}
UPPER = {"name": "upper", "layers": {"first": 4, "last": 7}}
RATES = {"bottom": 5e-5, "top": 1e-4}


def in_stages(*stages: Node, **edits: Any) -> Edits:
    """Edits that give explicit stages in place of a schedule."""
    return {"spec.schedule": None, "spec.stages": list(stages), **edits}


class Case(NamedTuple):
    """Two manifests on either side of one rule."""

    refused: Edits
    accepted: Edits
    path: str
    """Where the validator puts the problem of the refused one."""


CASES = {
    "give exactly one of schedule and stages": [
        Case({"spec.schedule": None}, {}, "spec.schedule"),
        Case({"spec.stages": [LOWER]}, in_stages(LOWER), "spec.schedule"),
    ],
    "give exactly one of layersPerStage and stageCount": [
        Case(
            {"spec.schedule": {"order": "TopDown"}},
            {"spec.schedule": {"order": "TopDown", "stageCount": 7}},
            "spec.schedule.layersPerStage",
        ),
        Case(
            {"spec.schedule.stageCount": 7},
            {"spec.schedule.stageCount": 7, "spec.schedule.layersPerStage": None},
            "spec.schedule.layersPerStage",
        ),
    ],
    "disjoint stages cannot see more rows": [
        Case(
            {"spec.schedule": {"stageCount": 4, "dataFraction": 1, "dataPartition": "Disjoint"}},
            {"spec.schedule": {"stageCount": 4, "dataFraction": 1, "dataPartition": "Shared"}},
            "spec.schedule.dataFraction",
        ),
        Case(
            {"spec.schedule": {"stageCount": 3, "dataFraction": 0.34, "dataPartition": "Disjoint"}},
            {
                "spec.schedule": {
                    "stageCount": 3,
                    "dataFraction": 0.3333333334,
                    "dataPartition": "Disjoint",
                }
            },
            "spec.schedule.dataFraction",
        ),
    ],
    "a file:// source has no revision": [
        Case(
            {"spec.model": {"source": "file://model", "revision": "main"}},
            {"spec.model": {"source": "ms://org/model", "revision": "main"}},
            "spec.model.revision",
        ),
        Case(
            {"spec.dataset.revision": "main"},
            {"spec.dataset.revision": "main", "spec.dataset.source": "hf://org/rows"},
            "spec.dataset.revision",
        ),
    ],
    "give exactly one of fraction and source": [
        Case(
            {"spec.dataset.validation": {}},
            {"spec.dataset.validation": {"source": "file://held-out.jsonl"}},
            "spec.dataset.validation",
        ),
        Case(
            {"spec.dataset.validation.source": "file://held-out.jsonl"},
            {},
            "spec.dataset.validation",
        ),
    ],
    "last is below first": [
        Case(
            in_stages(LOWER, {"name": "upper", "layers": {"first": 5, "last": 4}}),
            in_stages(LOWER, {"name": "upper", "layers": {"first": 5, "last": 5}}),
            "spec.stages[1].layers",
        ),
    ],
    "the embeddings train with layer 0": [
        Case(
            in_stages(LOWER, {**UPPER, "embeddings": True}),
            in_stages({**LOWER, "embeddings": True}, UPPER),
            "spec.stages[1].embeddings",
        ),
    ],
    "lora is only for": [
        Case({"spec.method.lora": {}}, {"spec.method": {"type": "LoRA"}}, "spec.method.lora"),
        Case(
            {"spec.method": {"type": "Expand", "lora": {"rank": 8}}},
            {"spec.method": {"type": "QLoRA", "lora": {"rank": 8}}},
            "spec.method.lora",
        ),
    ],
    "expand is only for": [
        Case(
            {"spec.method": {"type": "LoRA", "expand": {}}},
            {"spec.method": {"type": "Expand", "expand": {}}},
            "spec.method.expand",
        ),
    ],
    "leave schedule.head out": [
        Case(
            {"spec.method.type": "LoRA", "spec.schedule.head": "LastStage"},
            {"spec.schedule.head": "LastStage"},
            "spec.schedule.head",
        ),
    ],
    "leave schedule.embeddings out": [
        Case(
            {"spec.method.type": "QLoRA", "spec.schedule.embeddings": "FirstStage"},
            {"spec.schedule.embeddings": "FirstStage"},
            "spec.schedule.embeddings",
        ),
    ],
    "leave head and embeddings of every stage out": [
        Case(
            in_stages(LOWER, {**UPPER, "head": True}, **{"spec.method.type": "LoRA"}),
            in_stages(LOWER, {**UPPER, "head": True}),
            "spec.stages[1].head",
        ),
        Case(
            in_stages({**LOWER, "embeddings": True}, UPPER, **{"spec.method.type": "LoRA"}),
            in_stages({**LOWER, "embeddings": False}, UPPER, **{"spec.method.type": "LoRA"}),
            "spec.stages[0].embeddings",
        ),
    ],
    "learningRate and learningRateByDepth are both given": [
        Case(
            {"spec.training.learningRateByDepth": RATES},
            {"spec.training": {"learningRateByDepth": RATES}},
            "spec.training.learningRate",
        ),
    ],
    "give training.learningRate or": [
        Case({"spec.training": None}, {}, "spec.training.learningRate"),
        Case(
            in_stages({**LOWER, "learningRate": 1e-4}, UPPER, **{"spec.training": None}),
            in_stages({**LOWER, "learningRate": 1e-4}, **{"spec.training": None}),
            "spec.training.learningRate",
        ),
    ],
    "learningRateByDepth already gives": [
        Case(
            in_stages(
                LOWER,
                {**UPPER, "learningRate": 1e-4},
                **{"spec.training": {"learningRateByDepth": RATES}},
            ),
            in_stages(LOWER, UPPER, **{"spec.training": {"learningRateByDepth": RATES}}),
            "spec.stages[1].learningRate",
        ),
    ],
    "microBatchSize does not divide": [
        Case(
            {"spec.training.microBatchSize": 3},
            {"spec.training.microBatchSize": 8},
            "spec.training.microBatchSize",
        ),
        Case(
            {"spec.training.batchSize": 4, "spec.training.microBatchSize": 8},
            {"spec.training.batchSize": 24, "spec.training.microBatchSize": 8},
            "spec.training.microBatchSize",
        ),
    ],
    "export.format Adapter needs": [
        Case(
            {"spec.export.format": "Adapter"},
            {"spec.export.format": "Adapter", "spec.method.type": "LoRA"},
            "spec.export.format",
        ),
    ],
    "a resource name is longer": [
        Case(
            {"spec.runtime.resources.limits": {"n" * 129: "1"}},
            {"spec.runtime.resources.limits": {"n" * 128: "1"}},
            "spec.runtime.resources.limits." + "n" * 129,
        ),
    ],
    "metadata.name must be": [
        Case({"metadata.name": "n" * 41}, {"metadata.name": "n" * 40}, "metadata.name"),
        Case({"metadata.name": "Finance"}, {"metadata.name": "7-finance"}, "metadata.name"),
        Case({"metadata.name": "finance-"}, {"metadata.name": "f"}, "metadata.name"),
    ],
}


CHANGES: dict[str, Any] = {
    "model": {"source": "hf://Qwen/Qwen2.5-14B-Instruct"},
    "dataset": {"source": "file://other.jsonl", "validation": {"fraction": 0.05}},
    "method": {"type": "LoRA"},
    "schedule": {"layersPerStage": 8},
    "stages": [LOWER],
    "training": {"learningRate": 2e-4},
    "protection": {"anchor": {"weight": 0.5}},
    "runtime": {"queueName": "team-b"},
    "storage": {"size": "200Gi"},
    "evaluation": {"samples": 5},
    "export": {"dtype": "BF16"},
    "serve": {"replicas": 2},
}
"""For every field of `spec` but suspend a value that the sound manifest does not have."""

PREPARED = {"type": "Prepared", "status": "True", "reason": "Prepared"}
PREPARED |= {"lastTransitionTime": "2026-01-01T00:00:00Z"}
