"""A stage of ours seen from inside, for benchmarks/staging.py: its operations, and where time goes.

    python benchmarks/staging_inside.py STAGE.json

Does the task as the trainer's own process does. Operations of filling the prefix cache and of the
first step are counted by torch; steps after a warm-up are profiled; then the matrix products of the
stage's layers are timed alone, which is as fast as this processor does them. Written to
`inside.json` beside the stage's report. A task that is looked at like this is slower, and is not
timed.
"""

import argparse
import bisect
import dataclasses
import json
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils.flop_counter import FlopCounterMode

from stagetune_api.stage import StageConfig
from stagetune_trainer import train as task
from stagetune_trainer.loop import StageLoop
from stagetune_trainer.run import run_task
from stagetune_trainer.training_state import TrainingState
from stagetune_trainer.update import Update

WARM_STEPS = 2
"""After the one that is counted; all later steps are profiled."""
_MARK = "section: "
_GEMM = {"aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm"}
_ATTENTION = ("scaled_dot_product", "flash_attention")


class NeverStop:
    """Nobody asks it to stop."""

    requested = False


def main() -> None:
    """Do the stage's task and write what was seen."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage", type=Path)
    path = parser.parse_args().stage
    config = StageConfig.model_validate_json(path.read_bytes())
    inspector = Inspector(config)
    train = task.train
    task.train = lambda loop, state: inspector.train(train, loop, state)  # type: ignore[assignment]
    inspector.filling.__enter__()
    report, code = run_task(config, NeverStop())
    if report.failure is not None:
        raise SystemExit(report.failure.message)
    (path.parent / "inside.json").write_text(json.dumps(inspector.seen, indent=1))
    raise SystemExit(int(code))


class Inspector:
    """Stands between the task and its training loop."""

    def __init__(self, config: StageConfig) -> None:
        self.filling = FlopCounterMode(display=False)
        self.stepping = FlopCounterMode(display=False)
        self.profile = profile(activities=[ProfilerActivity.CPU])
        self.seen: dict[str, Any] = {}
        self._config = config
        self._step = -1
        self._profiled_tokens = 0

    def train(self, train: Any, loop: StageLoop, state: TrainingState) -> None:
        """Run the loop with its batches and its updates looked at."""
        self.filling.__exit__(None, None, None)
        stage = loop.stage
        fills = stage.prefix_cache is not None and stage.prefix_cache.used
        self.seen["fillFlops"] = self.filling.get_total_flops() if fills else 0
        self._mark_layers(loop)

        def micro_batches(step: int) -> Sequence[Any]:
            self._begin(step)
            mark("data")
            batches = loop.micro_batches(step)
            if step > WARM_STEPS:
                self._profiled_tokens += sum(batch.input_ids.numel() for batch in batches)
            return batches

        watched = WatchedUpdate(loop.update, self._end)
        train(dataclasses.replace(loop, micro_batches=micro_batches, update=watched), state)
        self._after(loop)

    def _begin(self, step: int) -> None:
        self._step = step
        if step == 0:
            self.stepping.__enter__()
        if step == WARM_STEPS + 1:
            self.profile.__enter__()

    def _end(self) -> None:
        mark("between steps")
        if self._step == 0:
            self.stepping.__exit__(None, None, None)
            self.seen["stepFlops"] = self.stepping.get_total_flops()
        if self._step == self._steps - 1 and self._step > WARM_STEPS:
            self.profile.__exit__(None, None, None)

    @property
    def _steps(self) -> int:
        return self._config.stage.steps if self._config.stage is not None else 0

    def _after(self, loop: StageLoop) -> None:
        profiled = self._steps - 1 - WARM_STEPS
        if profiled < 1:
            return
        self.seen["profile"] = {
            name: round(seconds / profiled, 5)
            for name, seconds in seconds_by_part(self.profile.events()).items()
        }
        layer = loop.loss.decoder.layers[loop.stage.layers.first]
        self.seen["gemm"] = time_matrix_products(layer, self._profiled_tokens // profiled)

    def _mark_layers(self, loop: StageLoop) -> None:
        """Let every layer say when its forward and its backward pass begin."""
        decoder, stage = loop.loss.decoder, loop.stage
        opened = {
            index for span in stage.layer_ranges for index in range(span.first, span.last + 1)
        }

        def part(index: int) -> str:
            if index < stage.layers.first:
                return "prefix"
            return "group" if index in opened else "suffix"

        def begin(index: int, states: Tensor) -> None:
            mark(f"{part(index)} forward")
            if states.requires_grad and index > stage.layers.first:
                # The gradient of a layer's input ends its backward pass and begins the next one's.
                states.register_hook(lambda _: mark(f"{part(index - 1)} backward"))

        def begin_head(states: Tensor) -> None:
            mark("head forward")
            if states.requires_grad:
                states.register_hook(lambda _: mark(f"{part(decoder.num_layers - 1)} backward"))

        for index, layer in enumerate(decoder.layers):
            layer.register_forward_pre_hook(
                lambda _, given, index=index: begin(index, given[0])  # type: ignore[misc]
            )
        for norm in decoder.final_norms[:1]:
            norm.register_forward_pre_hook(lambda _, given: begin_head(given[0]))


class WatchedUpdate:
    """An update that says when its parts begin."""

    def __init__(self, update: Update, end: Any) -> None:
        self._update = update
        self._end = end
        self.when_not_finite = update.when_not_finite

    def begin(self, learning_rate: float) -> None:
        """See `Update`; so the others."""
        self._update.begin(learning_rate)

    def backward(self, loss: Tensor, **how: bool) -> None:
        """Compute gradients."""
        mark("head backward")
        self._update.backward(loss, **how)
        mark("optimizer")

    def gradient_norm(self) -> float:
        """Return the norm of the gradients, and clip them."""
        mark("optimizer")
        return self._update.gradient_norm()

    def apply(self) -> None:
        """Update the parameters."""
        self._update.apply()
        self._end()


def mark(section: str) -> None:
    """Say in the profile that `section` begins."""
    with record_function(_MARK + section):
        pass


def seconds_by_part(events: Iterable[Any]) -> dict[str, float]:
    """Return the seconds of all profiled steps by what they were spent on.

    Operations go by their own time, without that of those they call; what is left of a section is
    Python and what torch does between operations.
    """
    marks, operations = [], []
    for event in events:
        if event.name.startswith(_MARK):
            marks.append((event.time_range.start, event.name.removeprefix(_MARK)))
        else:
            operations.append(event)
    marks.sort()
    starts = [start for start, _ in marks]
    lengths: defaultdict[str, float] = defaultdict(float)
    for (start, section), end in zip(marks, starts[1:], strict=False):
        lengths[section] += end - start
    found: defaultdict[str, float] = defaultdict(float)
    for section, length in lengths.items():
        if section != "between steps":
            found[_part(section)] += length
    for event in operations:
        place = bisect.bisect_right(starts, event.time_range.start) - 1
        if place < 0 or not marks[place][1].startswith("group"):
            continue
        name = _operation(event.name, marks[place][1])
        if name is not None:
            found[name] += event.self_cpu_time_total
            found["groupOther"] -= event.self_cpu_time_total
    return {name: microseconds / 1e6 for name, microseconds in found.items()}


def _part(section: str) -> str:
    whole = {"data": "data", "optimizer": "optimizer"}
    parts = {"prefix": "prefix", "suffix": "suffix", "head": "headAndLoss", "group": "groupOther"}
    return whole.get(section) or parts[section.split()[0]]


def _operation(name: str, section: str) -> str | None:
    """Return the part that an operation inside the group belongs to; None for all others'."""
    if any(part in name for part in _ATTENTION):
        return "attention"
    if name in _GEMM:
        return "groupForwardGemm" if section.endswith("forward") else "groupBackwardGemm"
    return None


def time_matrix_products(layer: nn.Module, tokens: int) -> dict[str, Any]:
    """Return how fast the layer's matrix products are when nothing else runs between them.

    Forward and backward, at `tokens` rows, each repeated; and a large square one beside them.
    """
    flops = seconds = 0.0
    for module in layer.modules():
        if not isinstance(module, nn.Linear):
            continue
        weight = torch.randn(module.out_features, module.in_features)
        inputs, gradient = torch.randn(tokens, weight.shape[1]), torch.randn(tokens, len(weight))
        for left, right in (
            (inputs, weight.t()),
            (gradient, weight),
            (gradient.t(), inputs),
        ):
            flops += 2 * left.shape[0] * left.shape[1] * right.shape[1]
            seconds += _best_seconds(left, right)
    square = torch.randn(1536, 1536)
    return {
        "tokens": tokens,
        "threads": torch.get_num_threads(),
        "gflopsAtTheseShapes": round(flops / seconds / 1e9, 1),
        "gflopsOfALargeSquare": round(2 * 1536**3 / _best_seconds(square, square) / 1e9, 1),
    }


def _best_seconds(left: Tensor, right: Tensor, repeats: int = 15) -> float:
    """Return the least time of a product: the machine's other work does not make it faster."""
    out = torch.empty(left.shape[0], right.shape[1])
    found = []
    for _ in range(repeats):
        started = time.perf_counter()
        torch.mm(left, right, out=out)
        found.append(time.perf_counter() - started)
    return min(found)


if __name__ == "__main__":
    main()
