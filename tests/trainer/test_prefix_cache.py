"""A stage above a cache of hidden states: the same bits as without it, and never a wrong one."""

import errno
import json
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from stagetune_api import names
from stagetune_api.names import TrainerExitCode
from stagetune_api.report import Outcome, StageReport
from stagetune_api.stage import StageConfig
from stagetune_trainer import model, stage_model, tail_model
from stagetune_trainer.prefix.cache import PrefixCache
from stagetune_trainer.run import run_task
from stagetune_trainer.tensor_file import TensorFileWriter
from stop_requests import AfterChecks, NeverAsked

MakeConfig = Callable[..., StageConfig]
MakeStage = Callable[..., dict[str, Any]]
CACHED = {"prefixCache": {"used": True, "reason": "a test wants it"}}
LORA = {"type": "LoRA", "lora": {"rank": 2, "dropout": 0.1}}
SHUFFLED = {"epochs": 2.0, "steps": 16}


class Run:
    """Two stages after each other in a folder of their own, the second one looked at."""

    def __init__(
        self, make_config: MakeConfig, make_stage: MakeStage, root: Path, fields: dict[str, Any]
    ) -> None:
        self.root = root
        self._make_config = make_config
        self._make_stage = make_stage
        self._fields = {**fields, "run_directory": str(root)}
        self.reports: list[StageReport] = []

    def stage(
        self, index: int, first: int, last: int, *, stop: Any = None, **options: Any
    ) -> StageReport:
        stage = self._make_stage(index, first, last, **options)
        config = self._make_config("Train", stage=stage, chain=self.reports[:index], **self._fields)
        report, code = run_task(config, stop or NeverAsked())
        assert code in (TrainerExitCode.SUCCEEDED, TrainerExitCode.INTERRUPTED), report.failure
        if code is TrainerExitCode.SUCCEEDED:
            self.reports[index:] = [report]
        return report

    def set_training(self, **options: Any) -> None:
        self._fields["training"] = {**self._fields.get("training", {}), **options}

    def losses(self, directory: str) -> list[dict[str, Any]]:
        """Every loss that the stage has written down, validation and meters among them."""
        path = self.root / "stages" / directory / names.METRICS_FILE
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        kept = (
            "kind",
            "step",
            "loss",
            "losses",
            "gradNorm",
            "validationLoss",
            "generalLoss",
            "klToBase",
        )
        return [
            {key: line[key] for key in kept if key in line}
            for line in lines
            if line["kind"] in ("Step", "Validation", "Meters")
        ]

    def caches(self) -> list[str]:
        return sorted(path.name for path in (self.root / "cache").glob("prefix-*"))


@pytest.fixture
def make_run(
    make_later_config: MakeConfig, make_stage: MakeStage, tmp_path: Path
) -> Callable[..., Run]:
    """`make_run(name, **fields) -> Run` in a folder of that name."""
    return lambda name, **fields: Run(make_later_config, make_stage, tmp_path / name, fields)


def digest(report: StageReport) -> str:
    assert report.output is not None
    return report.output.digest


GENERAL = "The euro is the currency of France.\n\nTokyo is large.\n\nLima lies at the sea.\n"


def with_general_text(tmp_path: Path) -> dict[str, Any]:
    path = tmp_path / "general.txt"
    path.write_text(GENERAL * 8)
    return {"evaluation": {"generalText": {"source": f"file://{path}", "maxTokens": 200}}}


VARIANTS: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {"method": LORA},
    "one adapter a stage": {
        "method": {"type": "LoRA", "lora": {"rank": 2, "adapters": "PerStage"}}
    },
    "dora": {"method": {"type": "LoRA", "lora": {"rank": 2, "dora": True}}},
    "4 bits": {"method": {"type": "QLoRA", "lora": {"rank": 2}}},
    "added blocks": {"method": {"type": "Expand", "expand": {"layersPerBlock": 1}}},
    "bf16": {"training": {"precision": "BF16"}},
    "recomputed activations": {"training": {"gradientCheckpointing": "Always"}},
    "distilled": {"protection": {"distillation": {"weight": 0.1}}},
    "anchored": {"protection": {"anchor": {"weight": 0.1}}},
    "replayed": {"protection": {"replay": {"ratio": 0.5, "generated": {"tokens": 64}}}},
}


@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)
def test_the_losses_with_a_cache_are_those_without_it_to_the_bit(
    fields: dict[str, Any], make_run: Callable[..., Run], tmp_path: Path
) -> None:
    fields = {**fields, **with_general_text(tmp_path)}
    plain, cached = make_run("plain", **fields), make_run("cached", **fields)
    for run, options in ((plain, {}), (cached, CACHED)):
        run.stage(0, 0, 0, **SHUFFLED)
        run.stage(1, 1, 1, **SHUFFLED, **options)
        run.stage(2, 3, 3, **SHUFFLED, **options)
    for directory in ("02-layers-1-1", "03-layers-3-3"):
        assert cached.losses(directory) == plain.losses(directory)
        assert len(plain.losses(directory)) > 16
    assert list(map(digest, cached.reports)) == list(map(digest, plain.reports))
    assert len(cached.caches()) == 1
    assert not plain.caches()


@pytest.mark.parametrize(
    "family", ["llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "phi", "phi3"]
)
def test_every_family_s_losses_are_the_same(
    family: str, make_run: Callable[..., Run], make_tiny_model: Callable[..., Path]
) -> None:
    model = {"source": f"file://{make_tiny_model(family)}"}
    outputs = []
    for name, options in (("plain", {}), ("cached", CACHED)):
        run = make_run(name, model=model)
        run.stage(0, 0, 1)
        outputs.append(digest(run.stage(1, 2, 3, **options)))
    assert outputs[0] == outputs[1]


def test_a_cache_is_carried_on_from_the_border_before(
    make_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the layers in between are run, and only what lies above is loaded."""
    loaded = spied_parts(monkeypatch)
    run = make_run("run")
    run.stage(0, 0, 0)
    assert loaded == []
    run.stage(1, 1, 1, **CACHED)
    assert loaded == [(0, 1), (1, None)]
    assert run.caches() == ["prefix-1"]
    run.stage(2, 3, 3, **CACHED)
    assert loaded[2:] == [(1, 3), (3, None)]
    assert run.caches() == ["prefix-3"]


def spied_parts(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int | None]]:
    """The list that every part of a model which is loaded is written into: layers from, up to."""
    loaded: list[tuple[int, int | None]] = []
    before: list[weakref.ref[Any]] = []

    def spy(directory: Path, dtype: torch.dtype, first: int, stop: int | None = None) -> Any:
        assert all(reference() is None for reference in before), "two models are in memory"
        loaded.append((first, stop))
        part = tail_model.load_part(directory, dtype, first, stop)
        before.append(weakref.ref(part))
        return part

    monkeypatch.setattr(model, "load_part", spy)
    return loaded


def only_cache(run: Run) -> Path:
    (path,) = (run.root / "cache").glob("prefix-*")
    return path


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("harm", ["damaged", "removed", "half removed"])
def test_a_damaged_cache_is_never_read(harm: str, make_run: Callable[..., Run]) -> None:
    plain = make_run("plain")
    run = make_run("run")
    for each, options in ((plain, {}), (run, CACHED)):
        each.stage(0, 0, 0)
        each.stage(1, 1, 1, **options)
    path = only_cache(run)
    match harm:
        case "damaged":
            flip_a_bit(path / "train.safetensors")
        case "removed":
            shutil.rmtree(path)
        case "half removed":
            (path / "validation.safetensors").unlink()
    plain.stage(2, 3, 3)
    run.stage(2, 3, 3, **CACHED)
    assert digest(run.reports[2]) == digest(plain.reports[2])
    assert run.losses("03-layers-3-3") == plain.losses("03-layers-3-3")
    assert run.caches() == ["prefix-3"]


def test_a_cache_of_anything_else_is_computed_anew(make_run: Callable[..., Run]) -> None:
    """The lowest stage was done again with another rate, so what lies below is another model."""
    run, plain = make_run("run"), make_run("plain")
    run.stage(0, 0, 1)
    run.stage(1, 2, 3, **CACHED)
    first = (only_cache(run) / "train.safetensors").read_bytes()
    shutil.rmtree(run.root / "stages")
    for each, options in ((run, CACHED), (plain, {})):
        each.reports.clear()
        each.stage(0, 0, 1, learningRate=1e-3)
        each.stage(1, 2, 3, **options)
    assert (only_cache(run) / "train.safetensors").read_bytes() != first
    assert digest(run.reports[1]) == digest(plain.reports[1])


def test_a_stage_of_other_rows_has_other_states(make_run: Callable[..., Run]) -> None:
    run, plain = make_run("run"), make_run("plain")
    part = {"rows": {"start": 16, "end": 32}, "steps": 4, "validationInterval": 2}
    for each, options in ((run, CACHED), (plain, {})):
        each.stage(0, 0, 0)
        each.stage(1, 1, 1, **options)
        each.stage(2, 3, 3, **part, **options)
    assert digest(run.reports[2]) == digest(plain.reports[2])
    stored = load_file(only_cache(run) / "train.safetensors")
    counts = stored["offsets"].diff()
    assert int((counts > 0).sum()) == 16


def test_a_disk_without_room_costs_time_and_nothing_else(
    make_run: Callable[..., Run],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    plain, run = make_run("plain"), make_run("run")
    plain.stage(0, 0, 1)
    plain.stage(1, 2, 3)
    run.stage(0, 0, 1)

    def is_full(self: TensorFileWriter, path: Path, tensors: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(TensorFileWriter, "__init__", is_full)
    run.stage(1, 2, 3, **CACHED)
    assert digest(run.reports[1]) == digest(plain.reports[1])
    assert run.caches() == []
    assert "no room for the hidden states below layer 2" in capsys.readouterr().out


def test_a_disk_that_is_nearly_full_keeps_its_room_for_checkpoints(
    make_run: Callable[..., Run],
    make_stage: MakeStage,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = make_run("run")
    run.stage(0, 0, 1)
    estimate = {**make_stage(1, 2, 3)["estimate"], "diskBytes": 600}
    wanted = {"prefixCache": {"used": True, "reason": "a test wants it", "diskBytes": 500}}
    usage = shutil.disk_usage(run.root)._replace(free=1000)
    monkeypatch.setattr("stagetune_trainer.prefix.cache.shutil.disk_usage", lambda path: usage)
    run.stage(1, 2, 3, estimate=estimate, **wanted)
    assert run.caches() == []
    assert "no prefix cache: it and the stage's checkpoints take" in capsys.readouterr().out


@pytest.mark.parametrize("base_is_asked", [True, False])
def test_without_a_cache_the_model_is_loaded_once_more_only_where_it_has_to_be(
    base_is_asked: bool, make_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run("run")
    run.stage(0, 0, 0)
    loaded: list[tuple[int, int | None]] = []
    load = stage_model.load_verified

    def spy(*args: Any, first: int, stop: int | None) -> Any:
        loaded.append((first, stop))
        return load(*args, first=first, stop=stop)

    monkeypatch.setattr(stage_model, "load_verified", spy)
    monkeypatch.setattr(PrefixCache, "obtain", lambda *args: False)
    index = len(run.reports)
    if base_is_asked:
        shutil.rmtree(run.root / "cache/teacher-validation")
    run.stage(index, 3, 3, **CACHED)
    assert loaded == ([(0, None)] if base_is_asked else [(0, 3), (0, None)])


def test_a_smaller_micro_batch_reads_the_cache_that_is_there(make_run: Callable[..., Run]) -> None:
    run = make_run("run")
    run.stage(0, 0, 1)
    run.stage(1, 2, 3, stop=AfterChecks(60), **SHUFFLED, **CACHED)
    written = only_cache(run).stat().st_mtime_ns
    run.set_training(microBatchSize=1)
    run.stage(1, 2, 3, **SHUFFLED, **CACHED)
    assert only_cache(run).stat().st_mtime_ns == written


@pytest.mark.parametrize("checks", [3, 60])
def test_a_stopped_stage_goes_on_from_its_cache_to_the_same_bits(
    checks: int, make_run: Callable[..., Run]
) -> None:
    """Once while the states are computed, once in the middle of training."""
    plain, run = make_run("plain"), make_run("run")
    for each in (plain, run):
        each.stage(0, 0, 1)
    plain.stage(1, 2, 3, **SHUFFLED)
    stopped = run.stage(1, 2, 3, stop=AfterChecks(checks), **SHUFFLED, **CACHED)
    assert stopped.outcome is Outcome.INTERRUPTED
    assert (run.caches() == []) is (checks == 3)
    run.stage(1, 2, 3, **SHUFFLED, **CACHED)
    assert digest(run.reports[1]) == digest(plain.reports[1])


def test_a_stage_that_began_without_a_cache_goes_on_with_one(make_run: Callable[..., Run]) -> None:
    plain, run = make_run("plain"), make_run("run")
    for each in (plain, run):
        each.stage(0, 0, 1)
    plain.stage(1, 2, 3, **SHUFFLED)
    run.stage(1, 2, 3, stop=AfterChecks(20), **SHUFFLED)
    run.stage(1, 2, 3, **SHUFFLED, **CACHED)
    assert digest(run.reports[1]) == digest(plain.reports[1])


def test_an_open_top_and_a_second_pass_have_their_caches(make_run: Callable[..., Run]) -> None:
    """A second pass begins below what the first one kept."""
    top = {"topLayers": {"first": 3, "last": 3}}
    plain, run = make_run("plain"), make_run("run")
    for each, options in ((plain, {}), (run, CACHED)):
        each.stage(0, 0, 0, **top)
        each.stage(1, 1, 1, **top, **options)
        each.stage(2, 0, 0, name="layers-0-p2", **top)
        each.stage(3, 1, 1, name="layers-1-p2", **top, **options)
    assert list(map(digest, run.reports)) == list(map(digest, plain.reports))


def test_from_the_top_down_a_cache_is_that_of_the_base(make_run: Callable[..., Run]) -> None:
    plain, run = make_run("plain"), make_run("run")
    for each, options in ((plain, {}), (run, CACHED)):
        each.stage(0, 3, 3, **options)
        each.stage(1, 1, 2, **options)
    assert list(map(digest, run.reports)) == list(map(digest, plain.reports))
    assert run.caches() == ["prefix-1"]
