"""An arm of benchmarks/staging.py without Stagetune: transformers and PEFT as a user writes them.

    python benchmarks/staging_plain.py MODEL BATCHES [--rank 16] [--positions all] [--steps 12]

AdamW in fp32, fused as in transformers' Trainer, gradients clipped at 1, no gradient checkpointing,
an attention mask. Full fine-tuning trains every weight; LoRA adapts every linear layer but the
head. With `--positions all` the loss is the model's own, with logits at every position; otherwise
the head sees the positions before answer tokens alone. `--flops FILE` counts the operations of the
first step instead, and writes them there.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from staging_arms import LEARNING_RATE

IGNORED = -100


def main() -> None:
    """Train the first steps and say so after each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("batches", type=Path)
    parser.add_argument("--rank", type=int)
    parser.add_argument("--positions", choices=("all", "answers"), default="answers")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--flops", type=Path)
    options = parser.parse_args()
    steps = json.loads(options.batches.read_text(encoding="utf-8"))["steps"][: options.steps]
    torch.manual_seed(0)
    model = load(options.model, options.rank)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, fused=True)
    if options.flops is not None:
        with FlopCounterMode(display=False) as counter:
            take_step(model, parameters, optimizer, steps[0], options.positions)
        options.flops.write_text(json.dumps({"stepFlops": counter.get_total_flops()}))
        return
    for number, step in enumerate(steps, 1):
        loss = take_step(model, parameters, optimizer, step, options.positions)
        print(json.dumps({"kind": "Step", "step": number, "loss": loss}), flush=True)


def load(directory: Path, rank: int | None) -> Any:
    """Return the model, ready to train: all of it, or adapters of `rank` beside it."""
    model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    if rank is not None:
        from peft import LoraConfig, get_peft_model

        adapters = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")
        model = get_peft_model(model, adapters)
    model.train()
    return model


def take_step(
    model: Any,
    parameters: list[nn.Parameter],
    optimizer: torch.optim.Optimizer,
    step: dict[str, Any],
    positions: str,
) -> float:
    """Take one step on the rows of `step` and return its loss in nats."""
    total = 0.0
    for batch in step["batches"]:
        inputs = {
            "input_ids": torch.tensor(batch["inputIds"]),
            "attention_mask": _mask(batch["lengths"], len(batch["inputIds"][0])),
        }
        labels = torch.tensor(batch["labels"])
        if positions == "all":
            loss = model(**inputs, labels=labels).loss
        else:
            loss = answer_loss(model, inputs, labels)
        loss.backward()
        total += float(loss.detach())
    nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return total / len(step["batches"])


def answer_loss(model: Any, inputs: dict[str, Tensor], labels: Tensor) -> Tensor:
    """Return the mean cross entropy of the answers; the head computes nothing else."""
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    hidden = model.base_model(**inputs).last_hidden_state
    targets = labels[:, 1:]
    labelled = targets != IGNORED
    logits = model.get_output_embeddings()(hidden[:, :-1][labelled])
    return nn.functional.cross_entropy(logits.float(), targets[labelled])


def _mask(lengths: list[int], width: int) -> Tensor:
    return (torch.arange(width) < torch.tensor(lengths).unsqueeze(1)).long()


if __name__ == "__main__":
    main()
