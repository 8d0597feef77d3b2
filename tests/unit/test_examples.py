"""The Qwen2.5-7B example is a valid manifest and its plan is the one that was looked at and kept.

Where a formula or a rule changes on purpose, write the plan anew, look at what changed with
`git diff`, and bring the table in docs/plan.md up to date:

    STAGETUNE_WRITE_GOLDEN=1 python -m pytest tests/unit/test_examples.py
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from stagetune_api.facts import DataFacts, Facts, ModelFacts
from stagetune_api.spec import StagedFineTune
from stagetune_api.stage import PlannedStage
from stagetune_api.validation import parse_manifest
from stagetune_operator.model_facts import model_facts_from_config
from stagetune_operator.plan import Plan, make_plan

ROOT = Path(__file__).resolve().parents[2]
MANIFEST = ROOT / "examples" / "qwen2.5-7b-finance.yaml"
CONFIG = ROOT / "examples" / "qwen2.5-7b-instruct.config.json"
GOLDEN = ROOT / "tests" / "data" / "golden" / "qwen2.5-7b-finance.plan.json"
# 5,000 rows of 200 tokens on average, two in five of them the answer's; docs/plan.md says so too.
DATA = DataFacts(
    train_rows=4750,
    validation_rows=250,
    train_tokens=950_000,
    train_answer_tokens=380_000,
    max_row_tokens=1024,
)
GIB = 2**30


@pytest.fixture(scope="module")
def manifest() -> StagedFineTune:
    manifest = parse_manifest(YAML(typ="safe", pure=True).load(MANIFEST.read_text()))
    assert isinstance(manifest, StagedFineTune), manifest
    return manifest


@pytest.fixture(scope="module")
def plan(manifest: StagedFineTune) -> Plan:
    model = model_facts_from_config(json.loads(CONFIG.read_text()))
    assert isinstance(model, ModelFacts), model
    plan = make_plan(manifest.spec, Facts(model=model, data=DATA, model_directory="models/qwen"))
    assert isinstance(plan, Plan), plan
    return plan


def test_the_model_is_pinned_to_a_commit(manifest: StagedFineTune) -> None:
    assert re.fullmatch(r"[0-9a-f]{40}", manifest.spec.model.revision or "")


def test_the_plan_is_the_kept_one(plan: Plan) -> None:
    shown = json.dumps(plan.model_dump(mode="json"), indent=2) + "\n"
    if os.environ.get("STAGETUNE_WRITE_GOLDEN"):
        GOLDEN.write_text(shown)

    assert json.loads(shown) == json.loads(GOLDEN.read_text())


def _table_row(stage: PlannedStage) -> str:
    """Return the stage's line of the table in docs/plan.md."""
    cells = [
        stage.name,
        f"{stage.layers.first} to {stage.layers.last}",
        f"{stage.learning_rate:.3g}",
        str(stage.steps),
        f"{stage.estimate.trainable_parameters / 1e6:.1f} M",
        f"{stage.estimate.memory_bytes / GIB:.1f}",
        f"{stage.estimate.relative_step_flops:.2f}",
    ]
    return f"| {' | '.join(cells)} |"


def test_the_documented_table_shows_the_plan(plan: Plan) -> None:
    document = (ROOT / "docs" / "plan.md").read_text()
    summary = plan.summary

    assert "\n".join(_table_row(stage) for stage in plan.stages) in document
    document = " ".join(document.split())
    assert f"{summary.total_steps:,} steps" in document
    assert f"{summary.relative_total_flops:.2f} of one pass" in document
    assert f"{summary.peak_memory_bytes / GIB:.1f} GiB at the peak" in document
    assert f"{summary.full_fine_tuning.memory_bytes / GIB:.0f} GiB" in document
    assert f"{summary.disk_bytes / GIB:.1f} GiB on disk" in document
