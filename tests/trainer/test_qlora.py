"""QLoRA: what is held in 4 bits, what is trained beside it, and what it is merged onto."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

import tiny_decoders
from stagetune_api.names import TrainerExitCode
from stagetune_api.report import StageReport
from stagetune_api.stage import StageConfig
from stagetune_api.training_spec import LayerRange, LoraSpec
from stagetune_trainer.large_packages import hide_large_packages
from stagetune_trainer.methods import nf4
from stagetune_trainer.methods.nf4 import Nf4Linear
from stagetune_trainer.methods.qlora import QloraMethod
from stagetune_trainer.run import run_task
from stop_requests import AfterChecks

CPU = torch.device("cpu")
METHOD = {"type": "QLoRA", "lora": {"rank": 2}}
MakeConfig = Callable[..., StageConfig]
MakeStage = Callable[..., dict[str, Any]]
MakeModel = Callable[..., Path]


def weights(report: StageReport) -> dict[str, torch.Tensor]:
    assert report.output is not None
    return load_file(Path(report.output.path) / "model.safetensors")


@pytest.fixture
def train(make_later_config: MakeConfig, never: Any) -> Callable[..., StageReport]:
    """`train(stage, **fields)` of a QLoRA stage."""

    def run(stage: dict[str, Any], stop: Any = never, **fields: Any) -> StageReport:
        config = make_later_config("Train", stage=stage, **{"method": METHOD, **fields})
        report, code = run_task(config, stop)
        wanted = TrainerExitCode.SUCCEEDED if stop is never else TrainerExitCode.INTERRUPTED
        assert code is wanted, report.failure
        return report

    return run


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "phi", "phi3"])
def test_linear_modules_of_the_layers_and_nothing_else_are_in_4_bits(
    family: str, dtype: torch.dtype, make_tiny_model: MakeModel
) -> None:
    decoder, plain = (tiny_decoders.load(make_tiny_model(family), dtype) for _ in range(2))
    QloraMethod(None).compress(decoder, CPU)
    linear = dict(plain.layers.named_modules())
    held = {name for name, module in linear.items() if isinstance(module, nn.Linear)}
    compressed = dict(decoder.layers.named_modules())
    assert {name for name, module in compressed.items() if isinstance(module, Nf4Linear)} == held
    left = {name for name, _ in decoder.model.named_parameters()}
    all_names = {name for name, _ in plain.model.named_parameters()}
    assert all_names - left == {f"{plain.layers_path}.{name}.weight" for name in held}
    for name in held:
        weight = linear[name].weight.float()
        error = compressed[name].weight.float() - weight
        # Of normally distributed weights NF4 loses about a tenth.
        assert 0.05 < error.abs().mean() / weight.abs().mean() < 0.12
        stored = compressed[name].packed
        assert stored.dtype is torch.uint8
        assert stored.numel() == -(-weight.numel() // 2)
    close = torch.nn.functional.cosine_similarity(
        tiny_decoders.logits(decoder).flatten().float(),
        tiny_decoders.logits(plain).flatten().float(),
        dim=0,
    )
    assert 0.8 < close < 1 - 1e-6


def test_gradients_go_through_4_bit_weights_as_through_the_same_weights_in_full(
    make_tiny_model: MakeModel,
) -> None:
    linear = tiny_decoders.load(make_tiny_model("phi")).layers[0].mlp.fc1
    compressed = Nf4Linear(linear, CPU)
    linear.weight.data = compressed.weight
    inputs = torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(0))
    found, expected = inputs.clone().requires_grad_(), inputs.clone().requires_grad_()
    compressed(found).square().sum().backward()
    linear(expected).square().sum().backward()
    assert torch.equal(compressed(inputs), linear(inputs))
    assert found.grad is not None
    assert expected.grad is not None
    torch.testing.assert_close(found.grad, expected.grad)


@pytest.mark.parametrize("dora", [False, True])
def test_earlier_adapters_work_on_the_4_bit_base(dora: bool, make_tiny_model: MakeModel) -> None:
    method = QloraMethod(LoraSpec(rank=2, dora=dora))
    trained = tiny_decoders.load(make_tiny_model("llama"))
    method.compress(trained, CPU)
    opened = method.open(trained, tiny_decoders.stage(1, 2))
    begun = tiny_decoders.logits(trained)
    tiny_decoders.perturb(opened)
    expected = tiny_decoders.logits(trained)
    assert not torch.allclose(begun, expected)
    later = tiny_decoders.load(make_tiny_model("llama"))
    method.compress(later, CPU)
    method.apply(later, LayerRange(first=1, last=2), method.output(trained, opened))
    method.open(later, tiny_decoders.stage(3, 3, index=1))
    assert torch.equal(tiny_decoders.logits(later), expected)


def test_stage_learns_and_gives_the_same_bits_twice(
    train: Callable[..., StageReport], make_stage: MakeStage, tmp_path: Path
) -> None:
    reports = [
        train(make_stage(0, 1, 2), run_directory=str(tmp_path / name)) for name in ("one", "two")
    ]
    result = reports[0].train
    assert result is not None
    assert result.validation_loss < result.initial_validation_loss
    first, second = (weights(report) for report in reports)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_checkpointing_changes_no_bit_of_a_4_bit_stage(
    train: Callable[..., StageReport], make_stage: MakeStage, tmp_path: Path
) -> None:
    found = [
        weights(
            train(
                make_stage(0, 1, 2),
                run_directory=str(tmp_path / mode),
                training={"gradientCheckpointing": mode},
            )
        )
        for mode in ("Always", "Never")
    ]
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_stopped_stage_goes_on_to_the_same_bits_in_4_bits(
    train: Callable[..., StageReport], make_stage: MakeStage, tmp_path: Path
) -> None:
    stage = make_stage(0, 1, 2)
    method = {"type": "QLoRA", "lora": {"rank": 2, "dropout": 0.2}}
    unbroken = train(stage, method=method, run_directory=str(tmp_path / "unbroken"))
    fields = {"method": method, "run_directory": str(tmp_path / "stopped")}
    train(stage, AfterChecks(13), **fields)
    resumed = train(stage, **fields)
    first, second = weights(unbroken), weights(resumed)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_export_stands_on_the_base_s_own_weights(
    train: Callable[..., StageReport],
    make_later_config: MakeConfig,
    make_stage: MakeStage,
    never: Any,
) -> None:
    chain = [train(make_stage(0, 0, 1))]
    chain.append(train(make_stage(1, 2, 3), chain=chain))
    folders = {}
    for kind in ("Merged", "Adapter"):
        config = make_later_config("Export", chain=chain, method=METHOD, export={"format": kind})
        report, code = run_task(config, never)
        assert code is TrainerExitCode.SUCCEEDED, report.failure
        folder = Path(str(report.export))
        folders[kind] = folder.rename(folder.with_name(kind))
    base = load_file(Path(str(config.model_directory)) / "model.safetensors")
    merged = load_file(folders["Merged"] / "model.safetensors")
    adapters = {name: tensor for report in chain for name, tensor in weights(report).items()}
    changed = 0
    for name, weight in base.items():
        module = name.removesuffix(".weight")
        delta = torch.zeros_like(weight)
        if f"{module}.lora_A.weight" in adapters:
            factors = (adapters[f"{module}.lora_{side}.weight"] for side in ("B", "A"))
            second, first = factors
            delta = second @ first * 2.0
            changed += 1
        torch.testing.assert_close(merged[name], weight + delta, rtol=1e-6, atol=1e-7)
    assert changed == 4 * 7
    model = AutoModelForCausalLM.from_pretrained(config.model_directory, dtype=torch.float32)
    adapted = PeftModel.from_pretrained(model, folders["Adapter"]).eval()
    plain = AutoModelForCausalLM.from_pretrained(folders["Merged"], dtype=torch.float32).eval()
    tokens = torch.arange(3, 27).reshape(2, 12)
    with torch.no_grad():
        expected, found = plain(input_ids=tokens).logits, adapted(input_ids=tokens).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_machine_without_bitsandbytes_is_told_in_prepare(
    make_stage_config: MakeConfig, never: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent() -> None:
        raise ImportError("No module named 'bitsandbytes'")

    monkeypatch.setattr(nf4, "nf4_functions", absent)
    report, _ = run_task(make_stage_config(method=METHOD), never)
    assert report.failure is not None
    assert "spec.method.type" in report.failure.message
    assert "install it for this machine or use LoRA" in report.failure.message
    report, code = run_task(make_stage_config(method={"type": "LoRA"}, attempt=2), never)
    assert code is TrainerExitCode.SUCCEEDED, report.failure


@pytest.mark.parametrize("order", ["peft first", "bitsandbytes first"])
def test_adapters_are_plain_whenever_bitsandbytes_was_imported(
    order: str, make_tiny_model: MakeModel
) -> None:
    """In a process of its own: what peft finds when it is imported stays as it is."""
    imports = ["import stagetune_trainer.methods.lora", "nf4_functions()"]
    if order == "bitsandbytes first":
        imports.reverse()
    program = f"""
import json, sys
from stagetune_trainer.large_packages import hide_large_packages
hide_large_packages()
from stagetune_trainer.methods.nf4 import nf4_functions
{chr(10).join(imports)}
import torch
import tiny_decoders
from stagetune_trainer.methods.qlora import QloraMethod
decoder = tiny_decoders.load(sys.argv[1])
method = QloraMethod(None)
method.compress(decoder, torch.device("cpu"))
method.open(decoder, tiny_decoders.stage(1, 1))
module = decoder.layers[1].mlp.up_proj
print(json.dumps([type(module).__module__, float(tiny_decoders.logits(decoder).sum())]))
"""
    model = make_tiny_model("llama")
    done = subprocess.run(
        [sys.executable, "-c", program, str(model)],
        capture_output=True,
        text=True,
        env={**__import__("os").environ, "PYTHONPATH": ":".join(sys.path)},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    kind, total = json.loads(done.stdout.splitlines()[-1])
    assert kind == "peft.tuners.lora.layer"
    decoder = tiny_decoders.load(model)
    QloraMethod(None).compress(decoder, CPU)
    assert total == pytest.approx(float(tiny_decoders.logits(decoder).sum()), rel=1e-5)
    hide_large_packages()
