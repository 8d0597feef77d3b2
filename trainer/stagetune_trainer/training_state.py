"""Everything a stage needs to go on with the same bits: saved to and read from a checkpoint.

All tensors are safetensors, the optimizer's moments and the random state too, so that no file of a
run can carry code.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from stagetune_api import names
from stagetune_api.report import StopReason


@dataclass(kw_only=True)
class LoopState:
    """Where the loop stands between two optimizer steps."""

    step: int = 0
    """Optimizer steps that are done."""
    tokens: int = 0
    """Tokens that were trained on, padding left out."""
    padding_tokens: int = 0
    """Positions that were computed beside them and held padding."""
    train_seconds: float = 0.0
    """Seconds spent in training steps, over all attempts."""
    elapsed_seconds: float = 0.0
    """Seconds of all attempts up to this state, imports and loading included."""
    loss: float | None = None
    """Loss of the last step, in nats a token."""
    initial_validation_loss: float | None = None
    """Validation loss before the first step."""
    validation_loss: float | None = None
    """Validation loss that was computed last."""
    validated_step: int = -1
    """Step at which it was computed; -1 before the first."""
    validated_train_seconds: float = 0.0
    """`train_seconds` at that step."""
    best_step: int = 0
    """Step at which the validation loss was lowest."""
    best_validation_loss: float | None = None
    """The lowest validation loss, that before the first step included."""
    patience_reference: float | None = None
    """The validation loss that the next one has to beat by minDelta to count as a gain."""
    validations_without_gain: int = 0
    """Validations in a row that were no gain."""
    stopped_early: bool = False
    """Whether `stopped_by` is set."""
    stopped_by: StopReason | None = None
    """What of earlyStopping ended the stage."""
    initial_general_loss: float | None = None
    """Loss of the base model on general text; only where the first stage has measured it."""


@dataclass(kw_only=True)
class TrainingState:
    """All that changes while a stage trains."""

    parameters: dict[str, nn.Parameter]
    """The stage's trainable parameters, fp32 or bf16, by the method's stable names."""
    optimizer: Optimizer
    """Built after freezing, over exactly `parameters`."""
    loop: LoopState = field(default_factory=LoopState)
    """Where the loop stands."""
    keeps_best: bool = False
    """Whether the best parameters are kept and handed on instead of the last ones."""
    best: dict[str, Tensor] = field(default_factory=dict)
    """Copies of the parameters at `loop.best_step`; empty unless `keeps_best`."""

    def keep_best(self) -> None:
        """Remember the present parameters as the best, in host memory."""
        self.best = {
            name: value.detach().to("cpu", copy=True) for name, value in self.parameters.items()
        }

    @torch.no_grad()
    def restore_best(self) -> None:
        """Put the best parameters back in place, where they are kept."""
        for name, tensor in self.best.items():
            self.parameters[name].copy_(tensor)

    def save(self, directory: Path, random_state: "RandomState") -> None:
        """Write everything into `directory`."""
        save_file(_on_cpu(self.parameters), directory / names.WEIGHTS_FILE)
        if self.best and self.loop.best_step != self.loop.step:
            save_file(_on_cpu(self.best), directory / names.BEST_WEIGHTS_FILE)
        save_file(self._optimizer_tensors(), directory / names.OPTIMIZER_FILE)
        save_file(random_state.tensors, directory / names.RANDOM_STATE_FILE)
        text = json.dumps(asdict(self.loop), indent=2)
        (directory / names.LOOP_STATE_FILE).write_text(text, encoding="utf-8")

    @torch.no_grad()
    def load(self, directory: Path) -> None:
        """Read what `save` wrote, and set torch's random state."""
        weights = load_file(directory / names.WEIGHTS_FILE)
        if weights.keys() != self.parameters.keys():
            raise ValueError(f"{directory} holds other parameters than this stage trains")
        for name, parameter in self.parameters.items():
            parameter.copy_(weights[name])
        text = (directory / names.LOOP_STATE_FILE).read_text(encoding="utf-8")
        fields = json.loads(text)
        if fields.get("stopped_by") is not None:
            fields["stopped_by"] = StopReason(fields["stopped_by"])
        self.loop = LoopState(**fields)
        best = directory / names.BEST_WEIGHTS_FILE
        if best.exists():
            self.best = load_file(best)
        elif self.keeps_best:
            self.keep_best()
        self._load_optimizer(load_file(directory / names.OPTIMIZER_FILE))
        RandomState(load_file(directory / names.RANDOM_STATE_FILE)).restore()

    def _optimizer_tensors(self) -> dict[str, Tensor]:
        return {
            f"{name}.{key}": torch.as_tensor(value).detach().cpu().contiguous()
            for name, parameter in self.parameters.items()
            for key, value in self.optimizer.state[parameter].items()
        }

    def _load_optimizer(self, tensors: Mapping[str, Tensor]) -> None:
        for name, parameter in self.parameters.items():
            prefix = f"{name}."
            state = {
                key.removeprefix(prefix): value
                for key, value in tensors.items()
                if key.startswith(prefix) and "." not in key.removeprefix(prefix)
            }
            self.optimizer.state[parameter] = {
                key: value.to(parameter.device) for key, value in state.items()
            }


class RandomState:
    """torch's random state: that of dropout and stochastic rounding, all there is in a step."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors

    @classmethod
    def capture(cls) -> "RandomState":
        """Return the state as it is now."""
        tensors = {"cpu": torch.get_rng_state()}
        if torch.cuda.is_available():
            tensors["cuda"] = torch.cuda.get_rng_state()
        return cls(tensors)

    def restore(self) -> None:
        """Make the state current."""
        torch.set_rng_state(self.tensors["cpu"])
        if "cuda" in self.tensors and torch.cuda.is_available():
            torch.cuda.set_rng_state(self.tensors["cuda"])


def _on_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
