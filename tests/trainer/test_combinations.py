"""Methods, schedules, protection and optimizers together, where each has its own tests alone."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from stagetune_api import names
from stagetune_api.names import RunLayout, TrainerExitCode
from stagetune_api.report import StageReport
from stagetune_api.stage import StageConfig
from stagetune_trainer.assemble import assemble
from stagetune_trainer.run import run_task
from stop_requests import AfterChecks

MakeConfig = Callable[..., StageConfig]
MakeStage = Callable[..., dict[str, Any]]
CPU = torch.device("cpu")
TOP = {"first": 3, "last": 3}
EXPAND = {"type": "Expand", "expand": {"layersPerBlock": 2}}
EVERYTHING = {
    "distillation": {"weight": 0.5, "topK": 32},
    "anchor": {"weight": 0.1},
    "replay": {"ratio": 0.5, "generated": {"tokens": 400}},
}


def lora(kind: str = "LoRA", **options: Any) -> dict[str, Any]:
    return {"type": kind, "lora": {"rank": 2, **options}}


class Runs:
    """Whole runs on one prepared folder; the same fields go to every task."""

    def __init__(self, make: MakeConfig, never: Any) -> None:
        self._make, self._never = make, never

    def task(self, task: str, *, stop: Any = None, **fields: Any) -> StageReport:
        report, code = run_task(self._make(task, **fields), stop or self._never)
        wanted = TrainerExitCode.SUCCEEDED if stop is None else TrainerExitCode.INTERRUPTED
        assert code is wanted, report.failure
        return report

    def chain(self, stages: list[dict[str, Any]], **fields: Any) -> list[StageReport]:
        """Return the reports of `stages`, each of which has to go on where the last one ended."""
        chain: list[StageReport] = []
        for stage in stages:
            report = self.task("Train", stage=stage, chain=chain, **fields)
            assert report.train is not None
            if chain and chain[-1].train is not None:
                before = chain[-1].train.validation_loss
                assert report.train.initial_validation_loss == pytest.approx(before, rel=1e-3)
            chain.append(report)
        return chain

    def weights(self, chain: list[StageReport], **fields: Any) -> dict[str, Tensor]:
        """Return the finished model's weights."""
        config = self._make("Evaluate", chain=chain, **fields)
        model = assemble(config, CPU).model
        return {name: value.clone() for name, value in model.named_parameters()}

    def base_model(self, chain: list[StageReport], **fields: Any) -> Any:
        config = self._make("Evaluate", chain=chain, **fields)
        return AutoModelForCausalLM.from_pretrained(str(config.model_directory))

    def base(self, chain: list[StageReport], **fields: Any) -> dict[str, Tensor]:
        """Return the base model's weights."""
        return dict(self.base_model(chain, **fields).named_parameters())


@pytest.fixture
def runs(make_later_config: MakeConfig, never: Any) -> Runs:
    return Runs(make_later_config, never)


@pytest.fixture
def wide_model(make_tiny_model: Callable[..., Path]) -> dict[str, str]:
    """A model whose matrices have enough values for 8-bit moments."""
    folder = make_tiny_model("llama", hidden_size=64, intermediate_size=128)
    return {"source": f"file://{folder}"}


def output(report: StageReport) -> dict[str, Tensor]:
    assert report.output is not None
    return load_file(Path(report.output.path) / names.WEIGHTS_FILE)


def digest(report: StageReport) -> str:
    assert report.output is not None
    return report.output.digest


def test_blocks_go_on_in_a_second_pass(runs: Runs, make_stage: MakeStage) -> None:
    stages = [
        make_stage(index, 2 * (index % 2), 2 * (index % 2) + 1, name=f"s{index}")
        for index in range(4)
    ]
    chain = runs.chain(stages, method=EXPAND)
    for earlier, later in ((chain[0], chain[2]), (chain[1], chain[3])):
        assert output(earlier).keys() == output(later).keys()
        assert digest(earlier) != digest(later)


@pytest.mark.parametrize("in_backward", [False, True])
@pytest.mark.parametrize("precision", ["FP32", "BF16"])
def test_stopped_stage_of_blocks_with_8_bit_moments_goes_on_to_the_same_bits(
    precision: str,
    in_backward: bool,
    runs: Runs,
    make_stage: MakeStage,
    wide_model: dict[str, str],
    tmp_path: Path,
) -> None:
    training: dict[str, Any] = {"precision": precision, "optimizer": "AdamW8bit"}
    if in_backward:
        training |= {"optimizerInBackward": True, "microBatchSize": 4}
    fields: dict[str, Any] = {"method": EXPAND, "training": training, "model": wide_model}
    stage = make_stage(0, 0, 3)
    protection = {"distillation": {"weight": 0.5, "topK": 32}}
    reports = []
    for name in ("unbroken", "broken"):
        fields |= {"run_directory": str(tmp_path / name), "protection": protection}
        if name == "broken":
            # Both are in the middle of the steps.
            stop = AfterChecks(15 if in_backward else 24)
            runs.task("Train", stage=stage, stop=stop, **fields)
        reports.append(runs.task("Train", stage=stage, **fields))
    assert digest(reports[0]) == digest(reports[1])
    train = reports[0].train
    assert train is not None
    assert train.validation_loss < train.initial_validation_loss


def test_base_says_the_same_of_its_answers_with_and_without_blocks(
    runs: Runs, make_stage: MakeStage, tmp_path: Path
) -> None:
    protection = {"distillation": {"weight": 0.5, "topK": 32}}
    files = {}
    for precision in ("FP32", "BF16"):
        for method in ({"type": "Full"}, lora(), EXPAND):
            name = f"{precision}-{method['type']}"
            directory = tmp_path / name
            runs.task(
                "Train",
                stage=make_stage(0, 2, 3),
                method=method,
                protection=protection,
                training={"precision": precision},
                run_directory=str(directory),
            )
            teacher = RunLayout(directory).cache / "teacher-train" / names.TEACHER_FILE
            files[name] = teacher.read_bytes()
    for precision in ("FP32", "BF16"):
        assert files[f"{precision}-Full"] == files[f"{precision}-Expand"]
        assert files[f"{precision}-Full"] == files[f"{precision}-LoRA"]
    assert files["FP32-Full"] != files["BF16-Full"]


def test_teacher_in_4_bits_is_another_one(
    runs: Runs, make_stage: MakeStage, tmp_path: Path
) -> None:
    """QLoRA's stages begin as their teacher: both compute with the base in 4 bits."""
    fields = {"protection": EVERYTHING, "method": lora("QLoRA")}
    chain = runs.chain([make_stage(0, 0, 1), make_stage(1, 2, 3)], **fields)
    metrics = tmp_path / "run" / "stages" / "01-layers-0-1" / names.METRICS_FILE
    steps = [line for line in map(json.loads, metrics.read_text().splitlines()) if "losses" in line]
    assert 0 <= steps[0]["losses"]["distillation"] < 1e-5
    assert 0 <= steps[0]["losses"]["anchor"] < 1e-5
    second = chain[1].train
    assert second is not None
    assert second.kl_to_base is not None
    assert second.kl_to_base > 0
    teacher = RunLayout(tmp_path / "run").cache / "teacher-train"
    runs.task(
        "Train",
        stage=make_stage(0, 0, 1, name="plain"),
        **{**fields, "method": lora()},
    )
    plain = (teacher / names.TEACHER_FILE).read_bytes()
    runs.task("Train", stage=make_stage(0, 0, 1, name="again"), **fields)
    assert (teacher / names.TEACHER_FILE).read_bytes() != plain


AVERAGED: dict[str, dict[str, Any]] = {
    "QLoRA": lora("QLoRA"),
    "DoRA": lora(dora=True),
    "QDoRA": lora("QLoRA", dora=True),
    "per-stage": lora(adapters="PerStage", rankStabilized=True),
}


@pytest.mark.parametrize("method", AVERAGED.values(), ids=AVERAGED.keys())
def test_share_of_adapters_goes_from_the_base_itself_to_the_tuned_model(
    method: dict[str, Any], runs: Runs, make_stage: MakeStage
) -> None:
    stages = [make_stage(0, 0, 1, topLayers=TOP), make_stage(1, 1, 2, topLayers=TOP, name="second")]
    chain = runs.chain(stages, method=method)
    base = runs.base(chain)

    def finished(**protection: Any) -> dict[str, Tensor]:
        return runs.weights(chain, method=method, protection=protection)

    plain = finished()
    assert different(base, plain)
    assert different(finished(averaging={"alpha": 0.0}), base) == []
    assert different(finished(averaging={"alpha": 1.0}), plain) == []
    scaled = finished(averaging={"alpha": 0.5}, depthScaling={"bottom": 0.4})
    for name, value in scaled.items():
        layer = int(name.split(".")[2]) if ".layers." in name else 3
        kept = 0.5 * (0.4 + 0.6 * layer / 3)
        expected = base[name] + kept * (plain[name] - base[name])
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-7)
    if method["lora"].get("dora"):
        return
    protection = {"averaging": {"alpha": 0.5}, "depthScaling": {"bottom": 0.4}}
    report = runs.task(
        "Export",
        chain=chain,
        stages=stages,
        method=method,
        protection=protection,
        export={"format": "Adapter"},
    )
    merged: Any = PeftModel.from_pretrained(runs.base_model(chain), str(report.export))
    for name, value in dict(merged.merge_and_unload().named_parameters()).items():
        torch.testing.assert_close(value, scaled[name], rtol=1e-5, atol=1e-6)


def different(first: dict[str, Tensor], second: dict[str, Tensor]) -> list[str]:
    assert first.keys() == second.keys()
    return [name for name in first if not torch.equal(first[name], second[name])]


def test_embeddings_that_are_the_head_too_are_averaged_as_one(
    runs: Runs, make_stage: MakeStage, make_tiny_model: Callable[..., Path]
) -> None:
    model = {"source": f"file://{make_tiny_model('llama', tie_word_embeddings=True)}"}
    stages = [make_stage(0, 0, 1, embeddings=True), make_stage(1, 0, 3, embeddings=True, name="b")]
    training = {"optimizer": "AdamW8bit", "optimizerInBackward": True, "microBatchSize": 4}
    chain = runs.chain(stages, model=model, training=training)
    base, plain = runs.base(chain, model=model), runs.weights(chain, model=model)
    name = "model.embed_tokens.weight"
    assert "lm_head.weight" not in plain
    assert torch.equal(plain[name], output(chain[1])[name])
    protection = {"averaging": {"alpha": 0.5}, "depthScaling": {"bottom": 0.4}}
    report = runs.task(
        "Export", chain=chain, stages=stages, model=model, protection=protection, training=training
    )
    loaded = AutoModelForCausalLM.from_pretrained(str(report.export))
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    expected = base[name] + 0.5 * 0.4 * (plain[name] - base[name])
    torch.testing.assert_close(loaded.lm_head.weight.data, expected, rtol=1e-6, atol=1e-7)


METHODS: dict[str, dict[str, Any]] = {
    "Full": {"type": "Full"},
    "shared": lora(dropout=0.1),
    "per-stage": lora(dropout=0.1, adapters="PerStage"),
    "DoRA": lora(dora=True, dropout=0.1),
    "QLoRA": lora("QLoRA", dropout=0.1),
}


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())
def test_stopped_stage_with_everything_goes_on_to_the_same_bits(
    method: dict[str, Any],
    runs: Runs,
    make_stage: MakeStage,
    wide_model: dict[str, str],
    tmp_path: Path,
) -> None:
    """Cumulative and with an open top, all protection, sizes of batches of its own, 8-bit moments.

    The anchor stands below the open top, on a layer that the stage before has opened too.
    """
    fields: dict[str, Any] = {"method": method, "protection": EVERYTHING, "model": wide_model}
    first = make_stage(0, 0, 0, topLayers=TOP)
    second = make_stage(1, 0, 1, topLayers=TOP, batchSize=8, microBatchSize=4, steps=4)
    digests = []
    for name in ("unbroken", "broken"):
        fields["run_directory"] = str(tmp_path / name)
        chain = runs.chain([first], **fields, training={"optimizer": "AdamW8bit"})
        later = {
            "stage": second,
            "chain": chain,
            "training": {"optimizer": "AdamW8bit", "batchSize": 8, "microBatchSize": 4},
        }
        if name == "broken":
            runs.task("Train", stop=AfterChecks(21), **later, **fields)
            checkpoints = tmp_path / name / "stages" / "02-layers-0-1" / "checkpoints"
            (checkpoint,) = checkpoints.iterdir()
            assert checkpoint.name not in ("step-0", "step-4")
        digests.append(digest(runs.task("Train", **later, **fields)))
    assert digests[0] == digests[1]


def test_model_card_tells_the_sizes_of_batches_that_were_trained_with(
    runs: Runs, make_stage: MakeStage
) -> None:
    sizes = {"batchSize": 8, "microBatchSize": 4}
    stages = [make_stage(0, 0, 1, **sizes, steps=2), make_stage(1, 2, 3, steps=2)]
    first = runs.task("Train", stage=stages[0], training=sizes)
    chain = [first, runs.task("Train", stage=stages[1], chain=[first])]
    report = runs.task("Export", chain=chain, stages=stages)
    assert "| Batch size | 8, 4 |" in (Path(str(report.export)) / "README.md").read_text()


@pytest.mark.parametrize(
    ("protection", "is_tokenised"),
    [
        ({"replay": {"ratio": 0.9}, "anchor": {"weight": 1.0}, "averaging": {}}, False),
        ({"replay": {"generated": {"tokens": 300}}}, True),
    ],
)
def test_prepare_does_again_what_other_replayed_text_needs_and_no_more(
    protection: dict[str, Any],
    is_tokenised: bool,
    make_stage_config: MakeConfig,
    never: Any,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The profile of gradients goes by the digest of all rows and is measured again with them."""
    replay = {"ratio": 0.5, "generated": {"tokens": 400}}
    fields: dict[str, Any] = {"gradient_norm": {"batches": 1}, "protection": {"replay": replay}}
    first, _ = run_task(make_stage_config(**fields), never)
    assert first.facts is not None
    assert first.facts.gradients is not None
    capsys.readouterr()
    changed = protection | {"replay": replay | protection["replay"]}
    again, _ = run_task(make_stage_config(**{**fields, "protection": changed, "attempt": 2}), never)
    said = capsys.readouterr().out
    assert again.facts is not None
    assert again.facts.gradients == first.facts.gradients
    assert ("found the tokenised rows" in said) is not is_tokenised
    assert ("measuring the gradient norm" in said) is is_tokenised
    assert (again.facts.data.digest == first.facts.data.digest) is not is_tokenised


def test_stopped_second_pass_of_blocks_goes_on_to_the_same_bits(
    runs: Runs, make_stage: MakeStage, tmp_path: Path
) -> None:
    digests = []
    for name in ("unbroken", "broken"):
        fields: dict[str, Any] = {"method": EXPAND, "run_directory": str(tmp_path / name)}
        chain = runs.chain([make_stage(0, 0, 1), make_stage(1, 2, 3)], **fields)
        later = {"stage": make_stage(2, 0, 1, name="layers-0-1-p2"), "chain": chain, **fields}
        if name == "broken":
            runs.task("Train", stop=AfterChecks(9), **later)
        digests.append(digest(runs.task("Train", **later)))
    assert digests[0] == digests[1]
