"""What torch.compile gains in a stage's steps, and what it costs before the first of them.

    python benchmarks/compiling.py [--output FILE]

The model has SmolLM2-135M's shape and random weights. The stage is the ten layers at the top, which
begin with hidden states as from a prefix cache; each of its layers is compiled by itself, so that
all share their code. Steps with compiled layers and without take turns in one process.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from stage_flops import NUM_LAYERS, build_model
from stagetune_trainer.decoder import find_decoder, freeze_prefix
from stagetune_trainer.loss import AnswerLoss
from stagetune_trainer.prefix.window import LayerWindow

RESULT = Path(__file__).resolve().parent / "results" / "compiling.json"
FIRST = 20
SHAPES = ((8, 48), (4, 512))
"""Rows and tokens of each: the quick start's, and longer ones."""
ANSWERS = 5
STEPS = 12
THREADS = 2

Step = Callable[[], float]


def main() -> None:
    """Measure every shape, print what was found and write the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args()
    torch.set_num_threads(THREADS)
    with tempfile.TemporaryDirectory() as folder:
        # What an earlier run compiled would be found again.
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
        shapes = [measure(rows, tokens) for rows, tokens in SHAPES]
    for shape in shapes:
        print(shape)
    result = {
        "model": "SmolLM2-135M shape, random weights",
        "layers": f"{FIRST}-{NUM_LAYERS - 1}",
        "machine": platform.machine(),
        "threads": THREADS,
        "torch": torch.__version__,
        "commands": ["make bench-compile"],
        "shapes": shapes,
    }
    options.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def measure(rows: int, tokens: int) -> dict[str, Any]:
    """Return how long steps take with compiled layers and without."""
    torch.compiler.reset()
    plain, compiled = build_step(rows, tokens), build_step(rows, tokens, compiled=True)
    plain_loss = plain()
    begun = time.perf_counter()
    compiled_loss = compiled()
    first = time.perf_counter() - begun
    seconds: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(STEPS):
        for is_compiled, step in ((False, plain), (True, compiled)):
            begun = time.perf_counter()
            step()
            seconds[is_compiled].append(time.perf_counter() - begun)
    ratios = [new / old for old, new in zip(seconds[False], seconds[True], strict=True)]
    usual, faster = (statistics.median(seconds[key]) for key in (False, True))
    gain = usual - faster
    return {
        "rows": rows,
        "tokensPerRow": tokens,
        "stepRatio": {
            "median": round(statistics.median(ratios), 3),
            "min": round(min(ratios), 3),
            "max": round(max(ratios), 3),
        },
        "stepSeconds": round(usual, 3),
        "compileSeconds": round(first - faster, 1),
        "stepsUntilItPays": round((first - faster) / gain) if gain > 0 else None,
        "relativeLossDifference": abs(compiled_loss / plain_loss - 1),
    }


def build_step(rows: int, tokens: int, *, compiled: bool = False) -> Step:
    """Return a stage's optimizer step, which returns the loss that it began with."""
    model = build_model()
    decoder = find_decoder(model)
    loss = AnswerLoss(decoder)
    for layer in decoder.layers[FIRST:]:
        layer.requires_grad_(True)
        if compiled:
            layer.compile()
    parameters = [value for value in model.parameters() if value.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=True)
    model.train()
    freeze_prefix(decoder, FIRST, embeddings_train=False)
    window = LayerWindow(decoder)
    input_ids = torch.randint(0, model.config.vocab_size, (rows, tokens))
    labels = torch.full_like(input_ids, -100)
    labels[:, -ANSWERS:] = input_ids[:, -ANSWERS:]
    states = torch.randn(rows, tokens, model.config.hidden_size)

    def step() -> float:
        with window.above(FIRST, states):
            loss_sum, _ = loss(input_ids, labels)
        loss_sum.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss_sum.detach())

    return step


if __name__ == "__main__":
    main()
