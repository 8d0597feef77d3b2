"""FLOPs of one step of a stage, relative to one of full fine-tuning, counted by torch.

    python benchmarks/stage_flops.py [--output benchmarks/results/stage_flops.json]

The model has SmolLM2-135M's shape and random weights: FLOPs depend on shapes alone. Rows have 48
tokens, 5 of them answers, as the quick start's rows have on average. The arms are four stages and
a top stage of three layers, each with and without gradient checkpointing and with and without a
prefix cache, computed by the code that trains; full fine-tuning is one stage with all layers,
embeddings and the final norm.
"""

import argparse
import itertools
import json
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from stagetune_api.stage import PlannedStage, RowRange, StageEstimate
from stagetune_api.training_spec import LayerRange, MethodSpec
from stagetune_trainer.decoder import checkpoint_activations, find_decoder, freeze_prefix
from stagetune_trainer.loss import AnswerLoss
from stagetune_trainer.methods import make_method
from stagetune_trainer.prefix.window import LayerWindow

NUM_LAYERS = 30
ROWS, TOKENS, ANSWERS = 4, 48, 5
STAGES = [(0, 7), (8, 15), (16, 22), (23, 29), (27, 29)]
NOTHING = StageEstimate(
    trainable_parameters=0,
    weights_bytes=0,
    training_state_bytes=0,
    activation_bytes=0,
    memory_bytes=0,
    disk_bytes=0,
    step_flops=0,
    relative_step_flops=0.0,
)


def build_model() -> LlamaForCausalLM:
    """Return a frozen model of SmolLM2-135M's shape with random weights."""
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    model.requires_grad_(False)
    return model


def count_step(
    first: int, last: int, *, embeddings: bool, checkpointing: bool, cached: bool = False
) -> int:
    """Return the FLOPs of one forward and backward pass of a stage; cached, from its border up."""
    model = build_model()
    decoder = find_decoder(model)
    loss = AnswerLoss(decoder)
    stage = PlannedStage(
        index=0,
        name=f"layers-{first}-{last}",
        layers=LayerRange(first=first, last=last),
        embeddings=embeddings,
        head=False,
        learning_rate=1e-4,
        epochs=1,
        rows=RowRange(start=0, end=1),
        steps=1,
        warmup_steps=0,
        validation_interval=1,
        estimate=NOTHING,
    )
    make_method(MethodSpec()).open(decoder, stage)
    model.train()
    if checkpointing:
        checkpoint_activations(decoder, first)
    freeze_prefix(decoder, first, embeddings_train=embeddings)
    input_ids = torch.randint(0, model.config.vocab_size, (ROWS, TOKENS))
    labels = torch.full_like(input_ids, -100)
    labels[:, -ANSWERS:] = input_ids[:, -ANSWERS:]
    begin: AbstractContextManager[None] = nullcontext()
    if cached:
        states = torch.randn(ROWS, TOKENS, model.config.hidden_size)
        begin = LayerWindow(decoder).above(first, states)
    with FlopCounterMode(display=False) as counter:
        with begin:
            loss_sum, _ = loss(input_ids, labels)
        loss_sum.backward()
    return counter.get_total_flops()


def main() -> None:
    """Count every arm, print a table and write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/stage_flops.json"))
    output = parser.parse_args().output
    arms = []
    for checkpointing in (False, True):
        full = count_step(0, NUM_LAYERS - 1, embeddings=True, checkpointing=checkpointing)
        for (first, last), cached in itertools.product(STAGES, (False, True)):
            if cached and first == 0:
                continue
            flops = count_step(
                first, last, embeddings=False, checkpointing=checkpointing, cached=cached
            )
            arm = {
                "layers": f"{first}-{last}",
                "gradientCheckpointing": checkpointing,
                "prefixCache": cached,
                "stepFlops": flops,
                "fullStepFlops": full,
                "ratio": round(flops / full, 4),
            }
            arms.append(arm)
            print(
                f"layers {first:2}-{last:2}  checkpointing {checkpointing!s:5}  "
                f"cached {cached!s:5}  "
                f"{flops:.4g} FLOPs, {flops / full:.3f} of full fine-tuning"
            )
    output.parent.mkdir(parents=True, exist_ok=True)
    result = {
        "model": "SmolLM2-135M shape, random weights",
        "rows": ROWS,
        "tokensPerRow": TOKENS,
        "answerTokensPerRow": ANSWERS,
        "torch": torch.__version__,
        "arms": arms,
    }
    output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
