"""The documents name what there is: files, settings, states, reasons, metrics and tests."""

import json
import re
import urllib.request
from enum import StrEnum
from pathlib import Path

import pytest
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from fake_cluster import FACTS
from local_cluster.control_plane import free_ports
from manifest_cases import edited
from stagetune_api.progress import Progress, ProgressKind
from stagetune_api.report import CheckpointRef, FailureClass, Outcome, StageReport
from stagetune_api.spec import StagedFineTune
from stagetune_api.stage import StageConfig, Task
from stagetune_api.status import ConditionReason, ConditionType, RunState, StageState
from stagetune_api.validation import parse_manifest
from stagetune_operator.estimate import CLUSTER_GPU
from stagetune_operator.metrics import Metrics
from stagetune_operator.ownership import Owner
from stagetune_operator.plan import Plan, make_plan
from stagetune_operator.progress import ProgressStore
from stagetune_operator.settings import PREFIX, Settings
from stagetune_operator.stage_files import build_stage_file, steps_after_prepare
from stagetune_operator.store import Store

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md")), *sorted(DOCS.glob("*/*.md"))]
PACKAGES = ("crds/stagetune_api", "operator/stagetune_operator", "trainer/stagetune_trainer")


def rows(page: str, pattern: str) -> list[tuple[str, ...]]:
    """Return the groups of `pattern` in each row of a page's tables that begins with it."""
    return re.findall(rf"^\| {pattern} \|", (DOCS / page).read_text(), re.MULTILINE)


@pytest.mark.parametrize("package", [*PACKAGES, "client/stagetune"])
def test_every_module_has_its_line_in_the_architecture(package: str) -> None:
    text = (DOCS / "architecture.md").read_text()
    modules = {
        path.relative_to(ROOT / package).as_posix()
        for path in (ROOT / package).rglob("*.py")
        if path.name != "__init__.py"
    }
    assert modules
    assert {module for module in modules if f"`{module}`" not in text} == set()


def test_links_lead_to_files_that_there_are() -> None:
    broken = [
        f"{page.name}: {target}"
        for page in PAGES
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text())
        if "://" not in target and not (page.parent / target).exists()
    ]
    assert broken == []


def anchors(page: Path) -> set[str]:
    """Return what a link may name of a page: its headings as GitHub writes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_lead_to_headings_that_there_are() -> None:
    links = [
        (page, (page.parent / target).resolve() if target else page, heading)
        for page in PAGES
        for target, heading in re.findall(r"\]\(([^)#\s]*)#([^)\s]+)\)", page.read_text())
        if "://" not in target
    ]
    assert links
    broken = [
        f"{page.name}: {target.name}#{heading}"
        for page, target, heading in links
        if target.suffix == ".md" and heading not in anchors(target)
    ]
    assert broken == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_tests_that_are_named_are_there(page: Path) -> None:
    """A test with a file after it, or after the last of its neighbours, is in that file."""
    defined: dict[str, set[str]] = {}
    for path in (ROOT / "tests").rglob("test_*.py"):
        for name in re.findall(r"^def (test_\w+)\(", path.read_text(), re.MULTILINE):
            defined.setdefault(name, set()).add(path.name)
    text = page.read_text()
    named = set(re.findall(r"`(test_\w+)`", text))
    assert named - defined.keys() == set()
    for name, file in re.findall(r"`(test_\w+)` \(`(?:tests/\w+/)?(test_\w+\.py)`\)", text):
        assert file in defined[name], f"{name} is not in {file}"


def test_settings_of_the_operator_are_those_of_the_table() -> None:
    found = dict(rows("operator.md", rf"`{PREFIX}([A-Z_]+)` \| ([^|]+)"))
    assert set(found) == {name.upper() for name in Settings.model_fields}
    words = {"IMAGE_PULL_SECRETS": "none", "NAMESPACES": "all", "PROGRESS_URL": "none"}
    for name, field in Settings.model_fields.items():
        shown = found[name.upper()].strip("`")
        if field.is_required():
            assert shown == "required"
        elif name.upper() in words:
            assert not field.default
            assert shown == words[name.upper()]
        elif isinstance(field.default, float):
            assert float(shown) == field.default
        else:
            assert shown == str(field.default)


@pytest.mark.parametrize(
    "words",
    [ConditionType, ConditionReason, RunState, FailureClass],
    ids=lambda words: words.__name__,
)
def test_page_of_the_operator_explains_every_word_of_a_status(words: type[StrEnum]) -> None:
    firsts = re.findall(r"^\| (`[^|]+) \|", (DOCS / "operator.md").read_text(), re.MULTILINE)
    firsts += [row[0] for row in rows("operator.md", r"(\(empty\) or [^|]+)")]
    explained = {word for first in firsts for word in re.findall(r"`(\w+)`", first)}
    elsewhere = {RunState.INTERRUPTED} if words is RunState else set()
    assert set(words) - elsewhere <= explained


def test_metrics_of_the_operator_are_those_of_the_table() -> None:
    store, progress, metrics = Store(), ProgressStore(), Metrics("1.2.3")
    stage = {
        "name": "layers-0-1",
        "state": StageState.RUNNING,
        "loss": 1,
        "validationLoss": 1,
        "tokensPerSecond": 1,
        "step": 1,
        "totalSteps": 2,
        "measured": {"peakMemoryBytes": 1, "generalLoss": 1, "klToBase": 1},
    }
    metadata = {"namespace": "team", "name": "run", "uid": "u", "creationTimestamp": "2026"}
    key = store.apply_run("ADDED", {"metadata": metadata, "status": {"stages": [stage]}})
    pairs = [{"name": name, "value": "1"} for name in ("learning_rate", "grad_norm")]
    body = json.dumps({"trainerStatus": {"metrics": pairs}}).encode()
    progress.put(key, "01-layers-0-1", "pod", body)
    metrics.watch_runs(store, progress)
    metrics.count_write("Job", "create")
    metrics.count_post("200")
    exported = families(generate_latest(metrics.registry).decode())
    assert documented("stagetune_(?!trainer_)") == exported


def test_metrics_of_a_trainer_are_those_of_the_table() -> None:
    from stagetune_trainer.prometheus import PrometheusMetrics

    port, *_ = free_ports(1)
    sink = PrometheusMetrics(first_stage(), "layers-0-1", port=port, namespace="team-a")
    try:
        for kind in (ProgressKind.STEP, ProgressKind.CHECKPOINT):
            sink.write(line_with_everything(kind))
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
            exported = families(answer.read().decode())
    finally:
        sink.close(StageReport(name="layers-0-1", attempt=1, outcome=Outcome.SUCCEEDED))
    assert documented("stagetune_trainer_") == exported


def first_stage() -> StageConfig:
    """Return the stage file of a run's first stage."""
    manifest = parse_manifest(edited({"spec.dataset.source": "pvc://rows/finance.jsonl"}))
    assert isinstance(manifest, StagedFineTune)
    plan = make_plan(manifest.spec, FACTS, CLUSTER_GPU)
    assert isinstance(plan, Plan)
    owner = Owner(name="finance-qa", namespace="team-a", uid="0c4a3e62")
    step, *_ = steps_after_prepare(plan.stages)
    return build_stage_file(owner, manifest.spec, step, facts=FACTS, stages=plan.stages)


def line_with_everything(kind: ProgressKind) -> Progress:
    return Progress(
        kind=kind,
        task=Task.TRAIN,
        name="layers-0-1",
        attempt=1,
        time="2026-01-01T00:00:00.000Z",
        step=1,
        loss=1.0,
        losses={"answers": 1.0},
        validation_loss=1.0,
        general_loss=1.0,
        kl_to_base=1.0,
        learning_rate=1.0,
        grad_norm=1.0,
        tokens=1,
        tokens_per_second=1.0,
        padding_fraction=0.0,
        step_seconds=1.0,
        peak_memory_bytes=1,
        checkpoint=CheckpointRef(path="x", digest="y", step=1),
    )


Families = dict[str, tuple[str, frozenset[str]]]


def documented(prefix: str) -> Families:
    """Return type and labels of each metric in docs/metrics.md."""
    found = rows("metrics.md", rf"`({prefix}\w+)` \| (\w+) \| ([^|]+)")
    return {name: (kind, frozenset(re.findall(r"`(\w+)`", labels))) for name, kind, labels in found}


def families(text: str) -> Families:
    """Return type and labels of each of our metrics in what is scraped."""
    found: Families = {}
    for family in text_string_to_metric_families(text):
        if not family.name.startswith("stagetune_") or family.name.endswith("_created"):
            continue
        assert family.samples, f"{family.name} needs a sample to show its labels"
        name = f"{family.name}_total" if family.type == "counter" else family.name
        labels = {label for sample in family.samples for label in sample.labels} - {"le"}
        found[name] = (family.type, frozenset(labels))
    return found
