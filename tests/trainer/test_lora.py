"""LoRA's options: rsLoRA, DoRA, ranks by stage, adapters by stage, and what PEFT makes of them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import tiny_decoders
from stagetune_api.names import TrainerExitCode
from stagetune_api.report import StageReport
from stagetune_api.stage import StageConfig
from stagetune_api.training_spec import LayerRange, LoraSpec
from stagetune_trainer.methods import make_method
from stagetune_trainer.methods.adapters import adapted_modules, merge_adapters, module_of
from stagetune_trainer.methods.lora import LoraMethod
from stagetune_trainer.model import apply_chain, choose_numerics, load_base, load_chain
from stagetune_trainer.run import run_task

MakeConfig = Callable[..., StageConfig]
Run = Callable[..., dict[str, Path]]
TOKENS = torch.arange(3, 27).reshape(2, 12)


def logits(model: Any) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        result: torch.Tensor = model(input_ids=TOKENS).logits
    return result


def load(directory: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, **options)


@pytest.fixture
def run(
    make_later_config: MakeConfig, make_stage: Callable[..., dict[str, Any]], never: Any
) -> Run:
    """`run(stages, **fields) -> dict` of the folders of a run's exports, by format."""

    def train_all(stages: list[dict[str, Any]], **fields: Any) -> dict[str, Path]:
        chain: list[StageReport] = []
        for stage in stages:
            config = make_later_config("Train", chain=chain, stage=stage, **fields)
            report, code = run_task(config, never)
            assert code is TrainerExitCode.SUCCEEDED, report.failure
            chain.append(report)
        folders = {}
        for kind in ["Merged"] + ["Adapter"] * (fields["method"]["type"] != "Full"):
            config = make_later_config(
                "Export", chain=chain, stages=stages, **{**fields, "export": {"format": kind}}
            )
            report, code = run_task(config, never)
            assert code is TrainerExitCode.SUCCEEDED, report.failure
            folder = Path(str(report.export))
            folders[kind] = folder.rename(folder.with_name(f"export-{kind}"))
        folders["base"] = Path(str(config.model_directory))
        return folders

    return train_all


def assert_peft_agrees(folders: dict[str, Path]) -> PeftModel:
    """Plain PEFT on the base gives the merged model's logits, and neither gives the base's."""
    base = load(folders["base"])
    before = logits(base)
    adapted = PeftModel.from_pretrained(base, folders["Adapter"])
    merged = logits(load(folders["Merged"]))
    assert not torch.allclose(before, merged, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(logits(adapted), merged, rtol=1e-4, atol=1e-5)
    return adapted


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rank-stabilised": {"rankStabilized": True},
    "DoRA": {"dora": True},
    "both": {"rankStabilized": True, "dora": True, "alpha": 3.0},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_peft_and_transformers_load_what_was_trained(
    options: dict[str, Any], run: Run, make_stage: Callable[..., dict[str, Any]]
) -> None:
    method = {"type": "LoRA", "lora": {"rank": 4, **options}}
    # The second stage has a rank of its own and goes on with the adapters of layer 1.
    stages = [make_stage(0, 0, 1), make_stage(1, 2, 3, rank=6)]
    adapted = assert_peft_agrees(run(stages, method=method))
    config = adapted.peft_config["default"]
    assert config.use_dora == options.get("dora", False)
    assert config.use_rslora == options.get("rankStabilized", False)
    assert {module.lora_A["default"].out_features for module in lora_layers(adapted)} == {4, 6}


def lora_layers(model: Any) -> list[Any]:
    return [module for module in model.modules() if hasattr(module, "lora_A")]


@pytest.mark.parametrize("rank_stabilized", [False, True])
@pytest.mark.parametrize("alpha", [None, 5.0])
def test_adapters_of_each_stage_are_one_adapter_to_peft(
    alpha: float | None, rank_stabilized: bool, run: Run, make_stage: Callable[..., dict[str, Any]]
) -> None:
    lora = {"rank": 2, "adapters": "PerStage", "rankStabilized": rank_stabilized}
    method = {"type": "LoRA", "lora": {**lora, **({} if alpha is None else {"alpha": alpha})}}
    stages = [make_stage(0, 0, 1), make_stage(1, 1, 2, rank=3), make_stage(2, 1, 3)]
    adapted = assert_peft_agrees(run(stages, method=method))
    ranks = {module.lora_A["default"].out_features for module in lora_layers(adapted)}
    assert ranks == {2, 2 + 3 + 2, 3 + 2}


def test_stage_that_opens_a_layer_again_leaves_the_earlier_adapter_as_it_was(
    make_later_config: MakeConfig, make_stage: Callable[..., dict[str, Any]], never: Any
) -> None:
    method = {"type": "LoRA", "lora": {"rank": 2, "adapters": "PerStage"}}
    chain: list[StageReport] = []
    for index in range(2):
        config = make_later_config(
            "Train", chain=chain, stage=make_stage(index, 1, 1), method=method
        )
        report, code = run_task(config, never)
        assert code is TrainerExitCode.SUCCEEDED, report.failure
        chain.append(report)
    config = make_later_config("Export", chain=chain, method=method)
    assert config.model_digest is not None
    decoder = load_base(
        Path(str(config.model_directory)),
        config.model_digest,
        choose_numerics(config.training.precision),
    )
    outputs = load_chain(config.chain, config.model_digest)
    apply_chain(decoder, outputs, make_method(config.method))
    stored = [load_file(Path(parent.path) / "model.safetensors") for parent in config.chain]
    for name, module in adapted_modules(decoder):
        assert list(module.lora_A) == ["stage0", "stage1"]
        assert module.active_adapters == ["stage0", "stage1"]
        for tensors, adapter in zip(stored, module.lora_A, strict=True):
            assert torch.equal(module.lora_A[adapter].weight, tensors[f"{name}.lora_A.weight"])


def test_shared_adapter_of_another_rank_is_refused_when_put_back(
    make_tiny_model: Callable[..., Path],
) -> None:
    decoder = tiny_decoders.load(make_tiny_model("llama"))
    method = LoraMethod(LoraSpec(rank=2, target_modules=["q_proj"]))
    name = "model.layers.1.self_attn.q_proj"

    def tensors(rank: int) -> dict[str, torch.Tensor]:
        return {
            f"{name}.lora_A.weight": torch.ones(rank, 32),
            f"{name}.lora_B.weight": torch.ones(32, rank),
        }

    layers = LayerRange(first=1, last=1)
    method.apply(decoder, layers, tensors(2))
    with pytest.raises(ValueError, match=r"\[3, 32\] in a stage's output"):
        method.apply(decoder, layers, tensors(3))
    with pytest.raises(ValueError, match="does not hold the adapters"):
        method.apply(decoder, layers, {f"{name}.lora_A.weight": torch.ones(2, 32)})
    with pytest.raises(ValueError, match="no tensor of an adapter"):
        module_of(f"{name}.weight")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dora_begins_as_the_base_and_trains_a_length_for_each_row(
    dtype: torch.dtype, make_tiny_model: Callable[..., Path]
) -> None:
    decoder = tiny_decoders.load(make_tiny_model("llama"), dtype)
    weight = decoder.layers[2].mlp.up_proj.weight.clone()
    before = tiny_decoders.logits(decoder)
    opened = LoraMethod(LoraSpec(rank=2, dora=True)).open(decoder, tiny_decoders.stage(2, 2))
    tolerance = 1e-6 if dtype is torch.float32 else 2e-2
    torch.testing.assert_close(
        tiny_decoders.logits(decoder), before, rtol=tolerance, atol=tolerance
    )
    lengths = {name: value for name, value in opened.items() if name.endswith("magnitude_vector")}
    assert len(lengths) == 7
    assert {value.dtype for value in opened.values()} == {torch.float32}
    expected = torch.linalg.norm(weight.float(), dim=1)
    found = lengths["model.layers.2.mlp.up_proj.lora_magnitude_vector"]
    assert torch.equal(found, expected)
    # Not trained, it merges to the weight that was there, in bf16 too.
    merge_adapters(decoder)
    torch.testing.assert_close(decoder.layers[2].mlp.up_proj.weight, weight, rtol=1e-6, atol=0)


def test_two_adapters_of_one_trunk_stand_side_by_side(
    run: Run, make_stage: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    runs = {name: str(tmp_path / name) for name in ("trunk", "first", "second")}
    trunk = run([make_stage(0, 0, 3)], method={"type": "Full"}, run_directory=runs["trunk"])
    source = {"source": f"file://{trunk['Merged']}"}
    adapters = {}
    for name, layers in (("first", (0, 1)), ("second", (2, 3))):
        method = {"type": "LoRA", "lora": {"rank": 2}}
        stages = [make_stage(0, *layers)]
        folders = run(stages, method=method, model=source, run_directory=runs[name])
        adapters[name] = folders["Adapter"]
        merged = logits(load(folders["Merged"]))
        assert not torch.equal(merged, logits(load(trunk["Merged"])))
    base = load(trunk["Merged"])
    model = PeftModel.from_pretrained(base, adapters["first"], adapter_name="first")
    model.load_adapter(adapters["second"], adapter_name="second")
    for name in adapters:
        model.set_adapter(name)
        expected = logits(load(Path(runs[name]) / "export-Merged"))
        torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
    # Each says which model it belongs to.
    bases = {config.base_model_name_or_path for config in model.peft_config.values()}
    assert len(bases) == 1
    torch.testing.assert_close(logits(load(Path(bases.pop()))), logits(load(trunk["Merged"])))
