"""What benchmarks/quality.py compares: arms, each with the rates and passes that are swept.

An arm is a change of one manifest; a cell is an arm at one rate, number of passes and seed.
"""

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from trainer_tasks import edited

SEEDS = (1, 2, 3)
REFERENCE = "lora"
"""The arm that the others are held against."""
BASE_FILE = "base.json"
"""Scores of the base model, in the folder that the runs are made in."""

# Without the system prompt that the model's own template writes before every question: half of the
# tokens of a row would be the same sentence.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

MANIFEST: dict[str, Any] = {
    "apiVersion": "stagetune.io/v1alpha1",
    "kind": "StagedFineTune",
    "metadata": {"name": "quality"},
    "spec": {
        "model": {"source": "file://model.gguf", "chatTemplate": CHAT_TEMPLATE},
        "dataset": {
            "source": "file://train.jsonl",
            "validation": {"source": "file://validation.jsonl"},
            "maxLength": 128,
        },
        "schedule": {"stageCount": 1},
        "training": {
            "batchSize": 8,
            "microBatchSize": 8,
            "gradientCheckpointing": "Never",
            "precision": "FP32",
            "validationsPerEpoch": 1,
            # What a method learns and forgets is the same with it; seconds are compared without.
            "prefixCache": "Never",
        },
        "evaluation": {
            "exactMatch": {"maxRows": 1000, "maxNewTokens": 12},
            "generalText": {"source": "file://general_text.jsonl", "maxTokens": 2500},
        },
    },
}


@dataclass(frozen=True, kw_only=True)
class Arm:
    """A way of training, and the settings that are tried for it."""

    name: str
    title: str
    """What the table calls it."""
    edits: Mapping[str, Any]
    """Values by path below `spec`, dots between the parts."""
    rates: tuple[float, ...]
    passes: tuple[float, ...] = (1,)
    """Passes over the rows, of every stage."""
    repeated: tuple[tuple[float, float], ...] = ()
    """Rates and passes that the other seeds repeat; the first one alone is swept through all."""
    derived: Mapping[str, "Derived"] = field(default_factory=dict)
    """Arms that need no training of their own, by name."""


@dataclass(frozen=True, kw_only=True)
class Derived:
    """The same trained stages, put together in another way."""

    title: str
    edits: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One training run."""

    arm: Arm
    rate: float
    passes: float
    seed: int

    @property
    def id(self) -> str:
        """A name that says all of it."""
        return f"{self.arm.name}_{self.rate:g}_{self.passes:g}_{self.seed}"

    @property
    def ids(self) -> list[str]:
        """The ids of all that the cell measures, derived arms too."""
        return [self.id, *(self.derived_id(suffix) for suffix in self.arm.derived)]

    def derived_id(self, suffix: str) -> str:
        """Return the id of the cell's derived arm `suffix`."""
        return f"{self.arm.name}-{suffix}_{self.id.partition('_')[2]}"

    def manifest(self, edits: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Return the cell's manifest, with further `edits` on top."""
        own = {
            "training.learningRate": self.rate,
            "training.seed": self.seed,
            "schedule.epochsPerStage": self.passes,
        }
        return edited(MANIFEST, {**own, **self.arm.edits, **(edits or {})})


def _averaged(title: str) -> Mapping[str, Derived]:
    """Return the derived arm with base and tuned weights averaged."""
    return {
        "averaged": Derived(
            title=f"{title}, averaged with the base", edits={"protection.averaging": {}}
        )
    }


_STAGED_RATES = (1e-4, 2e-4, 4e-4)
_THREE = {"schedule.stageCount": 3, "schedule.openTop": 0}
_OPEN_TOP = {"schedule.stageCount": 3, "schedule.openTop": 3}
_GENERATED = {"generated": {"tokens": 6000}}

ARMS = (
    Arm(
        name="lora",
        title="LoRA r=16, all linear layers",
        edits={"method": {"type": "LoRA", "lora": {"rank": 16}}},
        rates=(5e-4, 1e-3, 2e-3),
        passes=(1, 2, 3),
        repeated=((2e-3, 1), (1e-3, 2), (2e-3, 2), (5e-4, 3), (1e-3, 3), (2e-3, 3)),
        derived=_averaged("LoRA"),
    ),
    Arm(
        name="full",
        title="full fine-tuning",
        edits={"schedule.embeddings": "FirstStage"},
        rates=(1e-4, 2e-4),
        passes=(1, 2),
        repeated=((2e-4, 1), (1e-4, 2), (2e-4, 2)),
    ),
    Arm(
        name="bottom-up",
        title="3 stages, bottom-up",
        edits=_THREE,
        rates=_STAGED_RATES,
        repeated=((2e-4, 1), (4e-4, 1)),
    ),
    Arm(
        name="top-down",
        title="3 stages, top-down",
        edits={**_THREE, "schedule.order": "TopDown"},
        rates=(1e-4, 2e-4),
        repeated=((2e-4, 1),),
    ),
    Arm(
        name="open-top",
        title="3 stages, top 3 layers always open",
        edits=_OPEN_TOP,
        rates=_STAGED_RATES,
        repeated=((1e-4, 1), (2e-4, 1)),
    ),
    Arm(
        name="two-bottom-up",
        title="2 stages, bottom-up",
        edits={"schedule.stageCount": 2, "schedule.openTop": 0},
        rates=(1e-4, 2e-4),
        passes=(1, 1.5),
        repeated=((1e-4, 1), (2e-4, 1), (1e-4, 1.5), (2e-4, 1.5)),
    ),
    Arm(
        name="two-bottom-up-replay",
        title="2 stages, bottom-up, generated replay",
        edits={
            "schedule.stageCount": 2,
            "protection.replay": {"ratio": 0.125, **_GENERATED},
        },
        rates=(2e-4,),
        passes=(1, 1.5),
        repeated=((2e-4, 1.5),),
    ),
    Arm(
        name="default",
        title="the default: 2 stages, bottom-up, prefix cache",
        edits={"schedule.stageCount": 2, "training.prefixCache": "Auto"},
        rates=(2e-4, 3e-4),
        passes=(1.25,),
    ),
    Arm(
        name="two-cached",
        title="the same, longer",
        edits={"schedule.stageCount": 2, "training.prefixCache": "Auto"},
        rates=(1e-4, 2e-4),
        passes=(1.5,),
    ),
    Arm(
        name="two-open-top",
        title="2 stages, top 3 layers always open",
        edits={"schedule.stageCount": 2, "schedule.openTop": 3},
        rates=_STAGED_RATES,
        passes=(1, 1.5),
        repeated=((1e-4, 1), (1e-4, 1.5), (2e-4, 1.5)),
    ),
    Arm(
        name="cumulative",
        title="3 stages, bottom-up, cumulative",
        edits={**_THREE, "schedule.cumulative": True},
        rates=(1e-4, 2e-4),
        repeated=((2e-4, 1),),
    ),
    Arm(
        name="open-top-replay",
        title="open top, generated replay",
        edits={**_OPEN_TOP, "protection.replay": {"ratio": 0.125, **_GENERATED}},
        rates=_STAGED_RATES,
        repeated=((2e-4, 1), (4e-4, 1)),
    ),
    Arm(
        name="two-open-top-replay",
        title="2 stages, open top, generated replay",
        edits={
            "schedule.stageCount": 2,
            "schedule.openTop": 3,
            "protection.replay": {"ratio": 0.125, **_GENERATED},
        },
        rates=_STAGED_RATES,
        passes=(1, 1.5),
        repeated=((1e-4, 1), (1e-4, 1.5), (2e-4, 1.5)),
    ),
    Arm(
        name="open-top-anchor",
        title="open top, anchor",
        edits={**_OPEN_TOP, "protection.anchor": {"weight": 1.0}},
        rates=(2e-4, 4e-4),
        repeated=((2e-4, 1),),
    ),
    Arm(
        name="open-top-distilled",
        title="open top, distillation",
        edits={**_OPEN_TOP, "protection.distillation": {"weight": 0.02}},
        rates=(2e-4, 4e-4),
        repeated=((2e-4, 1),),
    ),
    Arm(
        name="gradient-norm",
        title="3 groups by gradient norm",
        edits={**_THREE, "schedule.order": "GradientNorm"},
        rates=(1e-4, 2e-4),
        repeated=((2e-4, 1),),
    ),
    Arm(
        name="expand",
        title="Expand, a block after every 10 layers, one stage each",
        edits={
            "method": {"type": "Expand", "expand": {"layersPerBlock": 10}},
            "schedule.stageCount": 3,
        },
        rates=(5e-4, 1e-3),
        repeated=((1e-3, 1),),
    ),
)


def cells(seeds: tuple[int, ...] = SEEDS) -> Iterator[Cell]:
    """Yield all cells, one seed after the other, so that an unfinished sweep compares like arms.

    The first of `SEEDS` is swept through all rates and passes; the others repeat what matters then.
    """
    for seed in seeds:
        for arm in ARMS:
            swept = tuple(itertools.product(arm.rates, arm.passes))
            for rate, passes in swept if seed == SEEDS[0] else arm.repeated or swept:
                yield Cell(arm=arm, rate=rate, passes=passes, seed=seed)


def titles() -> dict[str, str]:
    """Return the title of every arm, derived ones too, in the order of the table."""
    found = {}
    for arm in ARMS:
        found[arm.name] = arm.title
        for suffix, derived in arm.derived.items():
            found[f"{arm.name}-{suffix}"] = derived.title
    return found
