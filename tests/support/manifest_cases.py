"""Manifests on both sides of every rule, for a reading of the CRD and for a real API server."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ruamel.yaml import YAML

from stagetune_api import names
from stagetune_api.structural import Node

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = [
    path
    for path in sorted((ROOT / "examples").rglob("*.yaml"))
    if f"\nkind: {names.KIND}\n" in path.read_text(encoding="utf-8")
]
"""The files of examples/ that hold a manifest of ours."""

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


SECTIONS_WITH_DEFAULTS: Edits = {
    "spec.training.earlyStopping": {},
    "spec.evaluation": {"exactMatch": {}},
    "spec.runtime": {
        "resources": {"limits": {"nvidia.com/gpu": 1}, "requests": {"memory": "32Gi"}},
        "tolerations": [{"key": "gpu"}],
    },
    "spec.storage": {"size": "200Gi"},
    "spec.retry": {"number": 1},
}
"""Edits that open the sections whose fields have defaults."""

LOWER = {"name": "lower", "layers": {"first": 0, "last": 3}}
UPPER = {"name": "upper", "layers": {"first": 4, "last": 7}}
RATES = {"bottom": 5e-5, "top": 1e-4}
IN_BACKWARD = {"learningRate": 1e-4, "optimizerInBackward": True}
AT_EXPORT = {"averaging": {}, "depthScaling": {"bottom": 0.5}}
DORA: Edits = {"spec.method": {"type": "LoRA", "lora": {"dora": True}}}
TWO_PROCESSES: Edits = {"spec.runtime": {"processesPerNode": 2}}
ZERO_3: Edits = {"spec.runtime": {"processesPerNode": 2, "deepspeed": {"zeroStage": 3}}}
REPLAY: Node = {"ratio": 0.1, "source": "hf://org/text"}


def in_stages(*stages: Node, **edits: Any) -> Edits:
    """Edits that give explicit stages in place of a schedule."""
    return {"spec.schedule": None, "spec.stages": list(stages), **edits}


def tolerating(*tolerations: Node) -> Edits:
    """Edits that give the run's pods tolerations."""
    return {"spec.runtime.tolerations": list(tolerations)}


class Case(NamedTuple):
    """Two manifests on either side of one rule."""

    refused: Edits
    accepted: Edits
    path: str
    """Where the validator puts the problem of the refused one."""


BY_GRADIENT = {"layersPerStage": 4, "order": "GradientNorm"}
EXPAND: Edits = {"spec.method.type": "Expand"}

SCHEDULE_CASES = {
    "stageCount times passes is more": [
        Case(
            {"spec.schedule": {"stageCount": 43, "passes": 3}},
            {"spec.schedule": {"stageCount": 64, "passes": 2}},
            "spec.schedule.passes",
        ),
        Case(
            {"spec.schedule": {"passes": 65}},
            {"spec.schedule": {"passes": 64}},
            "spec.schedule.passes",
        ),
    ],
    "overlap is not smaller than layersPerStage": [
        Case({"spec.schedule.overlap": 4}, {"spec.schedule.overlap": 3}, "spec.schedule.overlap"),
    ],
    "overlap has no meaning beside cumulative": [
        Case(
            {"spec.schedule": {"layersPerStage": 4, "overlap": 1, "cumulative": True}},
            {"spec.schedule": {"layersPerStage": 4, "openTop": 1, "cumulative": True}},
            "spec.schedule.overlap",
        ),
    ],
    "gradientNorm is only for": [
        Case(
            {"spec.schedule.gradientNorm": {}},
            {"spec.schedule": {**BY_GRADIENT, "gradientNorm": {}}},
            "spec.schedule.gradientNorm",
        ),
    ],
    "order GradientNorm runs the groups once": [
        Case(
            {"spec.schedule": {**BY_GRADIENT, field: value}},
            {"spec.schedule": {"layersPerStage": 4, "order": "TopDown", field: value}},
            "spec.schedule.order",
        )
        for field, value in (("cumulative", True), ("overlap", 1), ("passes", 2))
    ],
    "order GradientNorm may leave out": [
        Case(
            {"spec.schedule": {**BY_GRADIENT, field: value}},
            {"spec.schedule": {"layersPerStage": 4, field: value}},
            "spec.schedule.order",
        )
        for field, value in (("head", "LastStage"), ("embeddings", "FirstStage"))
    ],
    "remove openTop, cumulative": [
        Case(
            {**EXPAND, "spec.schedule": {"layersPerStage": 4, field: value}},
            {"spec.schedule": {"layersPerStage": 4, field: value}},
            "spec.schedule",
        )
        for field, value in (
            ("openTop", 1),
            ("cumulative", True),
            ("overlap", 1),
            ("order", "GradientNorm"),
        )
    ],
    "remove openTop from the stages": [
        Case(
            in_stages(LOWER, {**UPPER, "openTop": 1}, **EXPAND),
            in_stages(LOWER, {**UPPER, "openTop": 1}),
            "spec.stages[1].openTop",
        ),
    ],
    "dataOffset and dataFraction together": [
        Case(
            in_stages({**LOWER, "dataOffset": 0.5}),
            in_stages({**LOWER, "dataOffset": 0.5, "dataFraction": 0.5}),
            "spec.stages[0].dataOffset",
        ),
    ],
    "the rank of a stage is only": [
        Case(
            in_stages(LOWER, {**UPPER, "rank": 8}),
            in_stages(LOWER, {**UPPER, "rank": 8}, **{"spec.method.type": "LoRA"}),
            "spec.stages[1].rank",
        ),
    ],
    "the microBatchSize of a stage does not divide": [
        Case(
            in_stages(LOWER, {**UPPER, "microBatchSize": 3}),
            in_stages(LOWER, {**UPPER, "microBatchSize": 3, "batchSize": 24}),
            "spec.stages[1].microBatchSize",
        ),
        Case(
            in_stages({**LOWER, "batchSize": 6}, **{"spec.training.microBatchSize": 4}),
            in_stages({**LOWER, "batchSize": 12}, **{"spec.training.microBatchSize": 4}),
            "spec.stages[0].batchSize",
        ),
    ],
}
"""Rules of schedules and of explicit stages: `schedule_rules` and `schedule_checks`."""

CASES = {
    "stages lists the stages already": [
        Case({"spec.stages": [LOWER]}, in_stages(LOWER), "spec.schedule"),
        Case({"spec.stages": [LOWER]}, {"spec.schedule": None}, "spec.schedule"),
    ],
    "layersPerStage and stageCount say the same thing twice": [
        Case(
            {"spec.schedule.stageCount": 7},
            {"spec.schedule.stageCount": 7, "spec.schedule.layersPerStage": None},
            "spec.schedule.layersPerStage",
        ),
        Case(
            {"spec.schedule.stageCount": 7},
            {"spec.schedule": {"order": "TopDown"}},
            "spec.schedule.layersPerStage",
        ),
    ],
    "disjoint stages cannot see more rows": [
        Case(
            {"spec.schedule": {"dataFraction": 0.6, "dataPartition": "Disjoint"}},
            {"spec.schedule": {"dataFraction": 0.5, "dataPartition": "Disjoint"}},
            "spec.schedule.dataFraction",
        ),
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
        Case(
            {
                "spec.schedule": {
                    "stageCount": 2,
                    "passes": 2,
                    "dataFraction": 0.5,
                    "dataPartition": "Disjoint",
                }
            },
            {"spec.schedule": {"stageCount": 2, "dataFraction": 0.5, "dataPartition": "Disjoint"}},
            "spec.schedule.dataFraction",
        ),
    ],
    **SCHEDULE_CASES,
    "only hf:// and ms:// sources have revisions": [
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
        Case(
            {"spec.model": {"source": "pvc://models/base", "revision": "main"}},
            # What has no program behind it is another matter than what has no meaning.
            {"spec.model": {"source": "s3://models/base", "revision": "main"}},
            "spec.model.revision",
        ),
        Case(
            {"spec.dataset.source": "pvc://rows/finance.jsonl", "spec.dataset.revision": "main"},
            {"spec.dataset.source": "pvc://rows/finance.jsonl"},
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
    "use method.type: Full or remove schedule.head": [
        Case(
            {"spec.method.type": "Expand", "spec.schedule.head": "LastStage"},
            {"spec.method.type": "Expand", "spec.schedule.head": "Never"},
            "spec.schedule.head",
        ),
    ],
    "use method.type: Full or remove schedule.embeddings": [
        Case(
            {"spec.method.type": "Expand", "spec.schedule.embeddings": "FirstStage"},
            {"spec.method.type": "Expand"},
            "spec.schedule.embeddings",
        ),
    ],
    "remove head and embeddings of every stage": [
        Case(
            in_stages({**LOWER, "embeddings": True}, UPPER, **{"spec.method.type": "Expand"}),
            in_stages(LOWER, UPPER, **{"spec.method.type": "Expand"}),
            "spec.stages[0].embeddings",
        ),
    ],
    "adapters PerStage with dora": [
        Case(
            {"spec.method": {"type": "LoRA", "lora": {"dora": True, "adapters": "PerStage"}}},
            {"spec.method": {"type": "LoRA", "lora": {"dora": True}}},
            "spec.method.lora.adapters",
        ),
        Case(
            {"spec.method": {"type": "QLoRA", "lora": {"dora": True, "adapters": "PerStage"}}},
            {"spec.method": {"type": "QLoRA", "lora": {"adapters": "PerStage"}}},
            "spec.method.lora.adapters",
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
    "packing leaves no padding": [
        Case(
            {"spec.training.packing": True, "spec.training.groupByLength": True},
            {"spec.training.packing": True, "spec.training.groupByLength": False},
            "spec.training.groupByLength",
        ),
    ],
    "several processes need engine DeepSpeed": [
        Case(
            {"spec.runtime": {"engine": "Single", "processesPerNode": 2}},
            {"spec.runtime": {"engine": "Single", "processesPerNode": 1}},
            "spec.runtime.processesPerNode",
        ),
    ],
    "several nodes need engine DeepSpeed": [
        Case(
            {"spec.runtime": {"engine": "Single", "nodes": 2}},
            {"spec.runtime": {"engine": "Auto", "nodes": 2}},
            "spec.runtime.nodes",
        ),
    ],
    "storage.accessMode ReadWriteOnce is for the pods of one node": [
        Case(
            {"spec.runtime.nodes": 2, "spec.storage": {"size": "1Gi"}},
            {
                "spec.runtime.nodes": 2,
                "spec.storage": {"size": "1Gi", "accessMode": "ReadWriteMany"},
            },
            "spec.storage.accessMode",
        ),
        Case(
            {"spec.runtime.nodes": 2, "spec.storage": {"size": "1Gi"}},
            {"spec.runtime.nodes": 2, "spec.storage": {"claimName": "runs"}},
            "spec.storage.accessMode",
        ),
    ],
    "engine Single does without DeepSpeed": [
        Case(
            {"spec.runtime": {"engine": "Single", "deepspeed": {}}},
            {"spec.runtime": {"engine": "DeepSpeed", "deepspeed": {}}},
            "spec.runtime.deepspeed",
        ),
    ],
    "offload OptimizerAndParameters needs divided weights": [
        Case(
            {"spec.runtime.deepspeed": {"offload": "OptimizerAndParameters"}},
            {"spec.runtime.deepspeed": {"offload": "OptimizerAndParameters", "zeroStage": 3}},
            "spec.runtime.deepspeed.offload",
        ),
    ],
    "optimizer AdamW8bit scales blocks of one tensor": [
        Case(
            {**TWO_PROCESSES, "spec.training.optimizer": "AdamW8bit"},
            {"spec.training.optimizer": "AdamW8bit", "spec.runtime": {"processesPerNode": 1}},
            "spec.training.optimizer",
        ),
        Case(
            {"spec.runtime.engine": "DeepSpeed", "spec.training.optimizer": "AdamW8bit"},
            {"spec.runtime.engine": "Single", "spec.training.optimizer": "AdamW8bit"},
            "spec.training.optimizer",
        ),
    ],
    "optimizerInBackward updates before gradients are summed": [
        Case(
            {
                "spec.runtime.deepspeed": {},
                "spec.training.optimizerInBackward": True,
                "spec.training.microBatchSize": 16,
            },
            {"spec.training.optimizerInBackward": True, "spec.training.microBatchSize": 16},
            "spec.training.optimizerInBackward",
        ),
    ],
    "a batch has fewer micro-batches than there are processes": [
        Case(
            {"spec.runtime": {"processesPerNode": 3}, "spec.training.microBatchSize": 8},
            {"spec.runtime": {"processesPerNode": 3}, "spec.training.microBatchSize": 4},
            "spec.training.microBatchSize",
        ),
        Case(
            in_stages(LOWER, {**UPPER, "batchSize": 1}, **TWO_PROCESSES),
            in_stages(LOWER, {**UPPER, "batchSize": 2}, **TWO_PROCESSES),
            "spec.stages[1].microBatchSize",
        ),
    ],
    "zeroStage 3 cannot divide weights in 4 bits": [
        Case(
            {**ZERO_3, "spec.method": {"type": "QLoRA"}},
            {**ZERO_3, "spec.method": {"type": "LoRA"}},
            "spec.runtime.deepspeed.zeroStage",
        ),
    ],
    "zeroStage 3 leaves no whole weights": [
        Case({**ZERO_3, **DORA}, {**TWO_PROCESSES, **DORA}, "spec.runtime.deepspeed.zeroStage"),
    ],
    "zeroStage 3 divides decoder layers alone": [
        Case(
            {**ZERO_3, "spec.schedule.head": "LastStage"},
            {**TWO_PROCESSES, "spec.schedule.head": "LastStage"},
            "spec.runtime.deepspeed.zeroStage",
        ),
        Case(
            in_stages({**LOWER, "embeddings": True}, **ZERO_3),
            in_stages({**LOWER, "embeddings": True}, **TWO_PROCESSES),
            "spec.runtime.deepspeed.zeroStage",
        ),
    ],
    "optimizerInBackward needs a batch of one micro-batch": [
        Case(
            {"spec.training.optimizerInBackward": True, "spec.training.microBatchSize": 8},
            {"spec.training.optimizerInBackward": True, "spec.training.microBatchSize": 16},
            "spec.training.optimizerInBackward",
        ),
        Case(
            in_stages(
                LOWER,
                {**UPPER, "batchSize": 8},
                **{"spec.training": {**IN_BACKWARD, "batchSize": 4, "microBatchSize": 4}},
            ),
            in_stages(
                {**LOWER, "microBatchSize": 16},
                {**UPPER, "batchSize": 8, "microBatchSize": 8},
                **{"spec.training": {**IN_BACKWARD, "microBatchSize": 4}},
            ),
            "spec.training.optimizerInBackward",
        ),
    ],
    **{
        f"{field} has no base weights": [
            Case(
                {"spec.method.type": "Expand", f"spec.protection.{field}": value},
                {"spec.method.type": "LoRA", f"spec.protection.{field}": value},
                f"spec.protection.{field}",
            )
        ]
        for field, value in AT_EXPORT.items()
    },
    **{
        f"{field} of DoRA": [
            Case(
                {**DORA, "spec.export.format": "Adapter", f"spec.protection.{field}": value},
                {**DORA, "spec.export.format": "Merged", f"spec.protection.{field}": value},
                f"spec.protection.{field}",
            )
        ]
        for field, value in AT_EXPORT.items()
    },
    "export.format Adapter needs": [
        Case(
            {"spec.export.format": "Adapter"},
            {"spec.export.format": "Adapter", "spec.method.type": "LoRA"},
            "spec.export.format",
        ),
    ],
    "a resource name is longer": [
        Case(
            {f"spec.runtime.resources.{field}": {"n" * 129: "1"}},
            {f"spec.runtime.resources.{field}": {"n" * 128: "1"}},
            f"spec.runtime.resources.{field}." + "n" * 129,
        )
        for field in ("limits", "requests")
    ],
    "extended resources such as nvidia.com/gpu are only given out whole": [
        Case(
            {f"spec.runtime.resources.{field}": {"nvidia.com/gpu": "500m", "cpu": "500m"}},
            {f"spec.runtime.resources.{field}": {"nvidia.com/gpu": "2", "cpu": "500m"}},
            f"spec.runtime.resources.{field}.nvidia.com/gpu",
        )
        for field in ("limits", "requests")
    ],
    "a label's name is empty or longer": [
        Case(
            {"spec.runtime.nodeSelector": {"n" * 318: "yes"}},
            {"spec.runtime.nodeSelector": {"n" * 317: "yes"}},
            "spec.runtime.nodeSelector." + "n" * 318,
        ),
        Case(
            {"spec.runtime.nodeSelector": {"": "yes"}},
            {"spec.runtime.nodeSelector": {"n": ""}},
            "spec.runtime.nodeSelector.",
        ),
    ],
    "operator Exists compares no value": [
        Case(
            tolerating({"key": "gpu", "operator": "Exists", "value": "a100"}),
            tolerating({"key": "gpu", "operator": "Equal", "value": "a100"}),
            "spec.runtime.tolerations[0].value",
        ),
        Case(
            tolerating({"key": "gpu"}, {"operator": "Exists", "value": ""}),
            tolerating({"key": "gpu"}, {"operator": "Exists"}),
            "spec.runtime.tolerations[1].value",
        ),
    ],
    "operator Equal needs a key": [
        Case(
            tolerating({"effect": "NoSchedule"}),
            tolerating({"effect": "NoSchedule", "operator": "Exists"}),
            "spec.runtime.tolerations[0].key",
        ),
        Case(
            tolerating({"value": "a100"}),
            tolerating({"key": "gpu", "value": "a100"}),
            "spec.runtime.tolerations[0].key",
        ),
    ],
    "only effect NoExecute waits": [
        Case(
            tolerating({"key": "gpu", "effect": "NoSchedule", "tolerationSeconds": 60}),
            tolerating({"key": "gpu", "effect": "NoExecute", "tolerationSeconds": 60}),
            "spec.runtime.tolerations[0].tolerationSeconds",
        ),
        Case(
            tolerating({"key": "gpu", "tolerationSeconds": 0}),
            tolerating({"key": "gpu"}),
            "spec.runtime.tolerations[0].tolerationSeconds",
        ),
    ],
    "give exactly one of size and claimName": [
        Case({"spec.storage": {}}, {"spec.storage": {"size": "200Gi"}}, "spec.storage.size"),
        Case(
            {"spec.storage": {"size": "200Gi", "claimName": "runs"}},
            {"spec.storage": {"claimName": "runs"}},
            "spec.storage.size",
        ),
    ],
    "a claim that is there already has its class": [
        Case(
            {"spec.storage": {"claimName": "runs", "storageClassName": "fast"}},
            {"spec.storage": {"size": "200Gi", "storageClassName": "fast"}},
            "spec.storage.storageClassName",
        ),
    ],
    "Nothing deletes the claim that was made": [
        Case(
            {"spec.storage": {"claimName": "runs", "retain": "Nothing"}},
            {"spec.storage": {"size": "200Gi", "retain": "Nothing"}},
            "spec.storage.retain",
        ),
        Case(
            {"spec.storage": {"claimName": "runs", "retain": "Nothing"}},
            {"spec.storage": {"claimName": "runs", "retain": "Everything"}},
            "spec.storage.retain",
        ),
    ],
    "a pvc:// source names a claim and a path on it": [
        *(
            Case(
                {"spec.model.source": refused}, {"spec.model.source": accepted}, "spec.model.source"
            )
            for refused, accepted in (
                ("pvc://models", "pvc://models/base"),
                ("pvc://models/", "pvc://models/base/"),
                ("pvc://models/../other", "pvc://models/..other"),
                ("pvc://models/base/..", "pvc://models/base..."),
                ("pvc://models/./base", "pvc://models/.base"),
                ("pvc://../base", "pvc://a.b/base"),
                ("pvc://Models/base", "pvc://models/Base"),
                ("pvc://models//base", "pvc://models/a b/base"),
            )
        ),
        Case(
            {"spec.dataset.source": "pvc://rows/../other/rows.jsonl"},
            {"spec.dataset.source": "pvc://rows/rows.jsonl"},
            "spec.dataset.source",
        ),
        Case(
            {"spec.dataset.validation": {"source": "pvc://rows/a/../../b"}},
            {"spec.dataset.validation": {"source": "pvc://rows/a/b"}},
            "spec.dataset.validation.source",
        ),
        Case(
            {"spec.protection": {"replay": {**REPLAY, "source": "pvc://rows"}}},
            {"spec.protection": {"replay": {**REPLAY, "source": "pvc://rows/other.txt"}}},
            "spec.protection.replay.source",
        ),
        Case(
            {"spec.evaluation.generalText.source": "pvc://rows/.."},
            {"spec.evaluation.generalText.source": "pvc://rows/text.txt"},
            "spec.evaluation.generalText.source",
        ),
    ],
    "give exactly one of replay.source and replay.generated": [
        Case(
            {"spec.protection": {"replay": {"ratio": 0.1}}},
            {"spec.protection": {"replay": {"ratio": 0.1, "generated": {}}}},
            "spec.protection.replay",
        ),
        Case(
            {"spec.protection": {"replay": {**REPLAY, "generated": {}}}},
            {"spec.protection": {"replay": REPLAY}},
            "spec.protection.replay",
        ),
    ],
    "replay.source is evaluation.generalText.source too": [
        Case(
            {
                "spec.protection": {"replay": REPLAY},
                "spec.evaluation": {"generalText": {"source": REPLAY["source"]}},
            },
            {
                "spec.protection": {"replay": REPLAY},
                "spec.evaluation": {"generalText": {"source": "hf://org/held-out"}},
            },
            "spec.protection.replay.source",
        ),
    ],
    "replayed rows are micro-batches of their own": [
        Case(
            {
                "spec.protection": {"replay": REPLAY},
                "spec.training.optimizerInBackward": True,
                "spec.training.microBatchSize": 16,
            },
            {"spec.protection": {"replay": REPLAY}},
            "spec.protection.replay",
        ),
    ],
    "method.type Expand has layers that are not the base model's": [
        Case(
            {"spec.protection": {"anchor": {"weight": 1}}, "spec.method": {"type": "Expand"}},
            {"spec.protection": {"anchor": {"weight": 1}}},
            "spec.protection.anchor",
        ),
    ],
    "metadata.name must be": [
        Case({"metadata.name": "n" * 41}, {"metadata.name": "n" * 40}, "metadata.name"),
        Case({"metadata.name": "Finance"}, {"metadata.name": "7-finance"}, "metadata.name"),
        Case({"metadata.name": "finance-"}, {"metadata.name": "f"}, "metadata.name"),
    ],
}


QUANTITIES: dict[str, tuple[Any, ...]] = {
    "accepted": (0, 1, 8, "0", "1", "0.5", "500m", "48Gi", "1.5Gi", "2G", "9" * 32),
    "refused": (
        *(-1, 1.5, True, [1], {}),
        *("-1", "", "1.5GiB", "48 Gi", "Gi", "1e3", ".5", "+1", "1\n", "9" * 33),
    ),
}
"""Amounts of a resource on both sides of what the schema takes."""

FROZEN_CHANGES: dict[str, Any] = {
    "model": {"source": "hf://Qwen/Qwen2.5-14B-Instruct"},
    "dataset": {"source": "file://other.jsonl", "validation": {"fraction": 0.05}},
    "method": {"type": "LoRA"},
    "schedule": {"layersPerStage": 8},
    "training": {"learningRate": 2e-4},
    "protection": {"anchor": {"weight": 0.5}},
    "storage": {"size": "200Gi"},
    "evaluation": {"samples": 5},
    "export": {"dtype": "BF16"},
    "serve": {"replicas": 2},
}
"""For every field of `spec` that a started run keeps, a value that the sound manifest has not."""

FREE_CHANGES: dict[str, Any] = {
    "runtime": {"queueName": "team-b", "resources": {"limits": {"nvidia.com/gpu": 2}}},
    "suspend": True,
    "retry": {"number": 1, "fromStage": "lower"},
}
"""For every field of `spec` that may change at any time, a value that the sound manifest has not.

`stages` is neither: see STAGE_EDITS.
"""

PLANNED = {"type": "Planned", "status": "True", "reason": "Planned"}
PLANNED |= {"lastTransitionTime": "2026-01-01T00:00:00Z"}
"""The condition by which a run counts as started."""

MIDDLE = {"name": "middle", "layers": {"first": 2, "last": 5}}
THREE_STAGES = (LOWER, MIDDLE, UPPER)
ANOTHER = {"name": "another", "layers": {"first": 0, "last": 1}}


class StageEdit(NamedTuple):
    """A change of THREE_STAGES, and the states of those for which it is refused or accepted."""

    stages: tuple[Node, ...]
    refused: tuple[str, ...]
    """States of lower, middle and upper, of which each alone makes it a refused change."""
    accepted: tuple[str, ...]


STAGE_EDITS = {
    "first-changed": StageEdit(
        ({**LOWER, "epochs": 2}, MIDDLE, UPPER),
        ("Running Pending Pending", "Succeeded Queued Pending", "Failed Pending Pending"),
        ("Pending Pending Pending",),
    ),
    "second-changed": StageEdit(
        (LOWER, {**MIDDLE, "learningRate": 1e-3}, UPPER),
        (
            "Succeeded Queued Pending",
            "Succeeded Running Pending",
            "Succeeded Interrupted Pending",
            "Succeeded Failed Pending",
            "Succeeded Succeeded Succeeded",
        ),
        ("Succeeded Pending Pending", "Running Pending Pending"),
    ),
    "last-changed": StageEdit(
        (LOWER, MIDDLE, {**UPPER, "layers": {"first": 5, "last": 7}}),
        ("Succeeded Succeeded Running",),
        ("Succeeded Running Pending", "Pending Pending Pending"),
    ),
    "last-removed": StageEdit(
        (LOWER, MIDDLE),
        ("Succeeded Succeeded Running",),
        ("Succeeded Succeeded Pending", "Running Pending Pending"),
    ),
    "first-removed": StageEdit(
        (MIDDLE, UPPER), ("Running Pending Pending",), ("Pending Pending Pending",)
    ),
    "renamed": StageEdit(
        (LOWER, {**MIDDLE, "name": "centre"}, UPPER),
        ("Succeeded Running Pending",),
        ("Succeeded Pending Pending",),
    ),
    "added-at-the-end": StageEdit(
        (*THREE_STAGES, ANOTHER),
        (),
        ("Succeeded Succeeded Running", "Succeeded Pending Pending", "Pending Pending Pending"),
    ),
    "added-between": StageEdit(
        (LOWER, ANOTHER, MIDDLE, UPPER),
        ("Succeeded Running Pending", "Succeeded Succeeded Succeeded"),
        ("Succeeded Pending Pending", "Running Pending Pending"),
    ),
    "added-at-the-start": StageEdit(
        (ANOTHER, *THREE_STAGES), ("Running Pending Pending",), ("Pending Pending Pending",)
    ),
    "pending-swapped": StageEdit(
        (LOWER, UPPER, MIDDLE),
        ("Succeeded Running Pending", "Succeeded Succeeded Running"),
        ("Succeeded Pending Pending", "Running Pending Pending"),
    ),
    "replaced-but-for-the-first": StageEdit(
        (LOWER, ANOTHER), ("Succeeded Running Pending",), ("Succeeded Pending Pending",)
    ),
    "unchanged": StageEdit(
        THREE_STAGES, (), ("Succeeded Succeeded Running", "Pending Succeeded Pending")
    ),
}


def stage_edits(side: str) -> dict[str, tuple[tuple[Node, ...], str]]:
    """Return by name what STAGE_EDITS has on one side, each with one of its states."""
    return {
        f"{name}-{states.replace(' ', '-')}": (edit.stages, states)
        for name, edit in STAGE_EDITS.items()
        for states in getattr(edit, side)
    }


def stages_in(states: str) -> Node:
    """Return the status of a started run whose three stages are in `states`."""
    stages = [
        {"name": stage["name"], "layers": stage["layers"], "state": state}
        for stage, state in zip(THREE_STAGES, states.split(), strict=True)
    ]
    return {"conditions": [PLANNED], "stages": stages}
