"""The documents name what there is: files, settings, states, reasons, metrics and tests."""

import re
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from stagetune_api.progress import Progress, ProgressKind
from stagetune_api.report import CheckpointRef, FailureClass
from stagetune_api.spec import LayerRange
from stagetune_api.stage import Task
from stagetune_api.status import ConditionReason, ConditionType, RunState, StageState
from stagetune_operator.metrics import Metrics
from stagetune_operator.progress import ProgressStore
from stagetune_operator.settings import PREFIX, Settings
from stagetune_operator.store import Store

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md")), *sorted(DOCS.glob("decisions/*.md"))]
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


@pytest.mark.parametrize("page", ["reliability.md", "operator.md"])
def test_tests_that_are_named_are_there(page: str) -> None:
    """A test with a file after it, or after the last of its neighbours, is in that file."""
    defined: dict[str, set[str]] = {}
    for path in (ROOT / "tests").rglob("test_*.py"):
        for name in re.findall(r"^def (test_\w+)\(", path.read_text(), re.MULTILINE):
            defined.setdefault(name, set()).add(path.name)
    text = (DOCS / page).read_text()
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
    store = Store()
    metadata = {"namespace": "team", "name": "run", "uid": "u", "creationTimestamp": "2026"}
    values = {"loss": 1, "validationLoss": 1, "tokensPerSecond": 1, "step": 1, "totalSteps": 2}
    stage = {"name": "layers-0-1", "state": StageState.RUNNING, **values}
    stage["measured"] = {"peakMemoryBytes": 1}
    run = {"metadata": metadata, "status": {"stages": [stage]}}
    key = store.apply_run("ADDED", run)
    progress = ProgressStore()
    numbers = b'[{"name": "learning_rate", "value": "1"}, {"name": "grad_norm", "value": "1"}]'
    progress.put(key, "01-layers-0-1", "pod", b'{"trainerStatus": {"metrics": %s}}' % numbers)
    metrics = Metrics("1.2.3")
    metrics.watch_runs(store, progress)
    metrics.observe_stage(1)
    metrics.observe_handoff(1)
    metrics.observe_reconcile(1, True)
    metrics.count_write("Job", "create")
    metrics.count_post("200")
    assert documented("stagetune_(?!trainer_)") == exported(metrics.registry)


def test_metrics_of_a_trainer_are_those_of_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    from stagetune_trainer import prometheus

    monkeypatch.setattr(prometheus.PrometheusMetrics, "_serve", lambda self, port: None)
    metrics = prometheus.PrometheusMetrics.__new__(prometheus.PrometheusMetrics)
    metrics.__init__(_trainer_config(), "layers-0-1", port=1, namespace="team")  # type: ignore[misc]
    common = {"task": Task.TRAIN, "name": "layers-0-1", "attempt": 1}
    time = datetime.now(UTC).isoformat()
    numbers = {"loss": 1.0, "validation_loss": 1.0, "learning_rate": 1.0, "grad_norm": 1.0}
    counts = {"step": 1, "tokens": 1, "tokens_per_second": 1.0, "peak_memory_bytes": 1}
    saved = CheckpointRef(path="x", digest="y", step=1)
    for kind in (ProgressKind.STEP, ProgressKind.CHECKPOINT):
        line = {**common, **numbers, **counts, "step_seconds": 1.0, "checkpoint": saved}
        metrics.write(Progress.model_validate({"kind": kind, "time": time, **line}))
    assert documented("stagetune_trainer_") == exported(metrics._registry)


def documented(prefix: str) -> dict[str, tuple[str, frozenset[str]]]:
    """Return the metrics of docs/metrics.md with type and labels, by name."""
    found = rows("metrics.md", rf"`({prefix}\w+)` \| (\w+) \| ([^|]+)")
    return {name: (kind, frozenset(re.findall(r"`(\w+)`", labels))) for name, kind, labels in found}


def exported(registry: CollectorRegistry) -> dict[str, tuple[str, frozenset[str]]]:
    """Return the same of what a registry holds; each family needs a sample to show its labels."""
    found = {}
    for family in registry.collect():
        if not family.name.startswith("stagetune_"):
            continue
        kind = "gauge" if family.type == "info" else family.type
        ending = {"info": "_info", "counter": "_total"}.get(family.type, "")
        assert family.samples, family.name
        labels = {label for sample in family.samples for label in sample.labels} - {"le"}
        found[family.name + ending] = (kind, frozenset(labels))
    return found
