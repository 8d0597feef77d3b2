"""What an older version wrote is read: a run that it began goes on.

tests/data/older holds the files of one run, written before there were schedules with open tops,
optimizers and protection. They are never written anew: a field that is added needs a default.
"""

import json
from pathlib import Path

from fake_cluster import FACTS
from manifest_cases import ROOT, edited
from stagetune_api.report import StageReport
from stagetune_api.spec import StagedFineTune
from stagetune_api.stage import PlannedStage, StageConfig
from stagetune_api.structural import Node
from stagetune_api.validation import parse_manifest
from stagetune_operator.ownership import Owner
from stagetune_operator.plan import Plan, make_plan
from stagetune_operator.plan_record import digest_of_planned, read_plan_record
from stagetune_operator.stage_files import Step, build_stage_file

OLDER = ROOT / "tests" / "data" / "older"
MANIFEST = edited(
    {
        "spec.dataset.source": "pvc://rows/finance.jsonl",
        "spec.schedule": {"stageCount": 1},
        "spec.method": {"type": "LoRA"},
        # The default of that time, which its server wrote down.
        "spec.training.prefixCache": "Never",
    }
)


def manifest() -> StagedFineTune:
    parsed = parse_manifest(MANIFEST)
    assert isinstance(parsed, StagedFineTune)
    return parsed


def read(name: str) -> str:
    return Path(OLDER / name).read_text(encoding="utf-8")


def test_plan_of_an_older_version_is_followed_as_it_is() -> None:
    data = {name: read(name) for name in ("plan.json", "facts.json")}
    record = read_plan_record({**data, "spec-digest": read("spec-digest").strip()})

    assert record.facts == FACTS
    assert record.spec_digest == digest_of_planned(manifest().spec)
    planned = make_plan(manifest().spec, FACTS)
    assert isinstance(planned, Plan)
    # A later version may estimate otherwise.
    kept, today = ([_without_estimate(s) for s in plan.stages] for plan in (record.plan, planned))
    assert kept == today


def _without_estimate(stage: PlannedStage) -> Node:
    return stage.model_dump(exclude={"estimate"})


def test_manifest_that_an_older_version_kept_is_the_same() -> None:
    kept = StagedFineTune.model_validate_json(read("run.json"))

    # The server of that time wrote a default down that is none any more.
    schedule = manifest().spec.schedule
    assert kept.spec.schedule is not None
    assert schedule is not None
    assert kept.spec.schedule.epochs_per_stage == schedule.epochs == 1.0
    without = kept.spec.schedule.model_copy(update={"epochs_per_stage": None})
    assert without == schedule
    assert kept.spec.model_copy(update={"schedule": without}) == manifest().spec
    assert digest_of_planned(kept.spec) == read("spec-digest").strip()


def test_stage_file_of_an_older_version_is_that_of_today() -> None:
    spec = manifest().spec
    config = StageConfig.model_validate_json(read("stage.json"))
    assert config.stage is not None
    owner = Owner(name="finance-qa", namespace="team-a", uid="0c4a3e62-5d8f")

    today = build_stage_file(owner, spec, Step(task=config.task, stage=config.stage), facts=FACTS)

    assert config == today


def test_report_of_an_older_version_is_read() -> None:
    report = StageReport.model_validate_json(read("report.json"))
    assert report.train is not None
    written = json.loads(read("report.json"))["train"]
    assert report.train.model_dump(mode="json", exclude_none=True).items() >= {
        (name, value) for name, value in written.items() if value is not None
    }
