"""Peak memory of a model of 7 billion random weights, arm by arm: benchmarks/staging.py on a GPU.

    python benchmarks/staging_gpu.py ARM OUTPUT.json [--device cuda] [--shape qwen2.5-7b]

Memory depends on shapes alone, so the model needs no download: Qwen2.5-7B's configuration, bf16.
Each arm takes two steps on one row of 2,048 tokens with gradient checkpointing, in a process of its
own. A stage is opened, cut, loaded in part and updated by the code that trains; its cached states
are random too. Full fine-tuning and LoRA are transformers and PEFT as in `staging_plain`.
"""

import argparse
import json
import resource
import subprocess
import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LAYERS_PER_STAGE = 4
ROWS, TOKENS, ANSWERS = 1, 2048, 512
STEPS = 2
SHAPES: Mapping[str, Mapping[str, Any]] = {
    "qwen2.5-7b": {
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "tie_word_embeddings": False,
    },
    # For tests: every path of this file in seconds, without a GPU.
    "tiny": {
        "vocab_size": 256,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 8,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": False,
    },
}


@dataclass(frozen=True, kw_only=True)
class GpuArm:
    """What one process trains."""

    name: str
    layers: range | None = None
    """Layers of a stage; None for an arm that is no stage."""
    cached: bool = False
    rank: int | None = None


def arms(num_layers: int) -> list[GpuArm]:
    """Return full fine-tuning, LoRA, and every stage with a cache below it and without."""
    found = [GpuArm(name="full"), GpuArm(name="lora16", rank=16)]
    for first in range(0, num_layers, LAYERS_PER_STAGE):
        layers = range(first, min(first + LAYERS_PER_STAGE, num_layers))
        name = f"layers-{layers[0]}-{layers[-1]}"
        found.append(GpuArm(name=name, layers=layers))
        if first > 0:
            found.append(GpuArm(name=f"{name}-cached", layers=layers, cached=True))
    return found


def measure_all(output: Path, device: str = "cuda", shape: str = "qwen2.5-7b") -> None:
    """Measure every arm in a process of its own and write `output`.

    An arm that needs more memory than there is says so in its place.
    """
    found = []
    part = output.with_suffix(".part")
    for arm in arms(SHAPES[shape]["num_hidden_layers"]):
        command = [sys.executable, __file__, arm.name, str(part)]
        subprocess.run([*command, "--device", device, "--shape", shape], check=True)
        found.append(json.loads(part.read_text(encoding="utf-8")))
        print(found[-1], flush=True)
    part.unlink()
    by_name = {arm["name"]: arm for arm in found}
    for arm in found:
        for reference in ("full", "lora16"):
            both = arm["peakMemoryBytes"], by_name[reference]["peakMemoryBytes"]
            arm[f"over_{reference}"] = round(both[0] / both[1], 4) if all(both) else None
    summary = {
        "model": f"{shape} shape, random weights, bf16",
        "rows": ROWS,
        "tokensPerRow": TOKENS,
        "answerTokensPerRow": ANSWERS,
        "optimizer": "AdamW8bit (stages), AdamW (full, LoRA)",
        "arms": found,
    }
    output.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    """Measure the arm that the arguments name."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("arm")
    parser.add_argument("output", type=Path)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--shape", choices=tuple(SHAPES), default="qwen2.5-7b")
    options = parser.parse_args()
    shape = SHAPES[options.shape]
    arm = next(arm for arm in arms(shape["num_hidden_layers"]) if arm.name == options.arm)
    # Imported here: whoever starts the arms needs none of it.
    import torch

    device = torch.device(options.device)
    result: dict[str, Any] = {"name": arm.name, "device": device.type}
    if device.type == "cuda":
        result["device"] = torch.cuda.get_device_name(device)
    try:
        (_train_plain if arm.layers is None else _train_stage)(arm, shape, device)
        result["peakMemoryBytes"] = (
            torch.cuda.max_memory_allocated(device)
            if device.type == "cuda"
            else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        )
    except torch.OutOfMemoryError:
        result |= {"peakMemoryBytes": None, "outOfMemory": True}
    options.output.write_text(json.dumps(result), encoding="utf-8")


def _build(shape: Mapping[str, Any], device: Any, first: int = 0) -> Any:
    """Return a decoder with random weights from layer `first` up, and none below it."""
    import torch
    from transformers import AutoModelForCausalLM, Qwen2Config

    from stagetune_trainer.decoder import find_decoder

    config = Qwen2Config(**shape)
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.requires_grad_(False)
    decoder = find_decoder(model)
    unloaded = [*decoder.layers[:first], *([decoder.embeddings] if first else [])]
    below = {id(parameter) for module in unloaded for parameter in module.parameters()}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in below:
                values = torch.empty_like(parameter, device=device).normal_(std=0.02)
                setattr(module, name, torch.nn.Parameter(values, requires_grad=False))
    decoder = find_decoder(model)
    # Its tables are computed and not loaded, so those on the meta device have no numbers.
    rotary: Any = decoder.backbone.rotary_emb
    decoder.backbone.rotary_emb = type(rotary)(config=config).to(device)
    return find_decoder(model)


def _tokens(shape: Mapping[str, Any], device: Any) -> tuple[Any, Any]:
    import torch

    tokens = min(TOKENS, 2048 if shape["hidden_size"] > 64 else 32)
    input_ids = torch.randint(0, shape["vocab_size"], (ROWS, tokens), device=device)
    labels = torch.full_like(input_ids, -100)
    answers = min(ANSWERS, tokens // 4)
    labels[:, -answers:] = input_ids[:, -answers:]
    return input_ids, labels


def _train_stage(arm: GpuArm, shape: Mapping[str, Any], device: Any) -> None:
    import torch

    from stage_flops import NOTHING
    from stagetune_api.stage import PlannedStage, RowRange
    from stagetune_api.training_spec import LayerRange, MethodSpec, OptimizerType, TrainingSpec
    from stagetune_trainer.decoder import checkpoint_activations, freeze_prefix
    from stagetune_trainer.loss import AnswerLoss
    from stagetune_trainer.methods import make_method
    from stagetune_trainer.model import Numerics
    from stagetune_trainer.optimizers import choose_master_dtype, make_optimizer
    from stagetune_trainer.prefix.window import LayerWindow
    from stagetune_trainer.update import make_update

    if arm.layers is None:
        raise ValueError(f"{arm.name} is no stage")
    first = arm.layers[0]
    numerics = Numerics(device=device, dtype=torch.bfloat16)
    training = TrainingSpec(learning_rate=1e-5, optimizer=OptimizerType.ADAMW_8BIT)
    stage = PlannedStage(
        index=0,
        name=arm.name,
        layers=LayerRange(first=first, last=arm.layers[-1]),
        embeddings=False,
        head=False,
        learning_rate=1e-5,
        epochs=1,
        rows=RowRange(start=0, end=1),
        steps=STEPS,
        warmup_steps=0,
        validation_interval=STEPS,
        estimate=NOTHING,
    )
    decoder = _build(shape, device, first if arm.cached else 0)
    window = LayerWindow(decoder)
    method = make_method(MethodSpec(), choose_master_dtype(training, numerics))
    with window.probing(first if arm.cached else 0):
        loss = AnswerLoss(decoder)
        parameters = method.open(decoder, stage)
        decoder.model.train()
        checkpoint_activations(decoder, first)
        freeze_prefix(decoder, first, embeddings_train=False)
    optimizer = make_optimizer(parameters, training)
    update = make_update(training, parameters, optimizer)
    input_ids, labels = _tokens(shape, device)
    for _ in range(STEPS):
        update.begin(1e-5)
        begin: AbstractContextManager[None] = nullcontext()
        if arm.cached:
            size = (*input_ids.shape, shape["hidden_size"])
            begin = window.above(first, torch.randn(size, device=device, dtype=torch.bfloat16))
        with numerics.autocast(), begin:
            total, count = loss(input_ids, labels)
        update.backward(total / count)
        update.gradient_norm()
        update.apply()


def _train_plain(arm: GpuArm, shape: Mapping[str, Any], device: Any) -> None:
    import torch

    from staging_plain import answer_loss

    model = _build(shape, device).model
    if arm.rank is None:
        model.requires_grad_(True)
    else:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(
            model, LoraConfig(r=arm.rank, lora_alpha=2 * arm.rank, target_modules="all-linear")
        )
    model.train()
    model.activation_checkpointing_enable()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=True)
    input_ids, labels = _tokens(shape, device)
    for _ in range(STEPS):
        inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=arm.rank is not None):
            loss = answer_loss(model, inputs, labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()


if __name__ == "__main__":
    main()
