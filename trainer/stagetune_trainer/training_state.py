"""Everything a stage needs to go on with the same bits: saved to and read from a checkpoint.

All tensors are safetensors, the optimizer's moments and the random state too, so that no file of a
run can carry code.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from stagetune_api import names
from stagetune_api.report import StopReason
from stagetune_trainer.ranks import ALONE, Ranks


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


class HeldTensors(Protocol):
    """What trains and its optimizer's state, however they are held.

    Where several processes hold parts, all call each of these together. The first one gets and
    gives the whole tensors; the others get nothing, and what they give is not looked at.
    """

    def parameters(self, *, copy: bool = False) -> dict[str, Tensor]:
        """Return the parameters in host memory; a `copy` stays as it is when they change."""

    def set_parameters(self, tensors: Mapping[str, Tensor]) -> None:
        """Overwrite the parameters with those of `tensors`, all or none."""

    def optimizer_state(self) -> dict[str, Tensor]:
        """Return the optimizer's state in host memory as `<parameter>.<key>`."""

    def set_optimizer_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Overwrite the optimizer's state; without tensors it is that before the first step."""


class WholeTensors:
    """Everything in this process, as torch's optimizer holds it."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], optimizer: Optimizer) -> None:
        self._parameters = parameters
        self._optimizer = optimizer

    def parameters(self, *, copy: bool = False) -> dict[str, Tensor]:
        """Return the parameters in host memory."""
        return {
            name: value.detach().to("cpu", copy=copy) for name, value in self._parameters.items()
        }

    @torch.no_grad()
    def set_parameters(self, tensors: Mapping[str, Tensor]) -> None:
        """Overwrite the parameters with those of `tensors`."""
        for name, tensor in tensors.items():
            self._parameters[name].copy_(tensor)

    def optimizer_state(self) -> dict[str, Tensor]:
        """Return the optimizer's state as `<parameter>.<key>`."""
        return {
            f"{name}.{key}": torch.as_tensor(value).detach().cpu()
            for name, parameter in self._parameters.items()
            for key, value in self._optimizer.state[parameter].items()
        }

    def set_optimizer_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Overwrite the optimizer's state."""
        for name, parameter in self._parameters.items():
            self._optimizer.state[parameter] = {
                key: value.to(parameter.device) for key, value in state_of(name, tensors).items()
            }


def state_of(parameter: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return what of an optimizer's state belongs to the parameter of that name, by key."""
    prefix = f"{parameter}."
    return {
        key.removeprefix(prefix): value
        for key, value in tensors.items()
        if key.startswith(prefix) and "." not in key.removeprefix(prefix)
    }


@dataclass(kw_only=True)
class TrainingState:
    """All that changes while a stage trains."""

    held: HeldTensors
    """The stage's trainable parameters, fp32 or bf16, by the method's stable names, and the
    optimizer's state of exactly these."""
    names: frozenset[str]
    """Names of the parameters."""
    ranks: Ranks = ALONE
    """The processes that hold them; the first one reads and writes checkpoints."""
    loop: LoopState = field(default_factory=LoopState)
    """Where the loop stands."""
    keeps_best: bool = False
    """Whether the best parameters are kept and handed on instead of the last ones."""
    best: dict[str, Tensor] = field(default_factory=dict)
    """Copies of the parameters at `loop.best_step`, in the first process; empty unless
    `keeps_best`."""

    def keep_best(self) -> None:
        """Remember the present parameters as the best, in host memory."""
        self.best = self.held.parameters(copy=True)

    def restore_best(self) -> None:
        """Put the best parameters back in place, where they are kept."""
        if self.keeps_best:
            self.held.set_parameters(self.best)

    def snapshot(self) -> "Snapshot":
        """Return the present state; all processes call this together."""
        return Snapshot(
            loop=asdict(self.loop),
            parameters=self.held.parameters(),
            optimizer=self.held.optimizer_state(),
            best=self.best if self.loop.best_step != self.loop.step else {},
        )

    def load(self, directory: Path) -> None:
        """Read what a snapshot wrote, and set torch's random state."""
        weights = load_file(directory / names.WEIGHTS_FILE) if self.ranks.is_first else {}
        if self.ranks.is_first and weights.keys() != self.names:
            raise ValueError(f"{directory} holds other parameters than this stage trains")
        self.held.set_parameters(weights)
        text = (directory / names.LOOP_STATE_FILE).read_text(encoding="utf-8")
        fields = json.loads(text)
        if fields.get("stopped_by") is not None:
            fields["stopped_by"] = StopReason(fields["stopped_by"])
        self.loop = LoopState(**fields)
        if self.keeps_best and self.ranks.is_first:
            best = directory / names.BEST_WEIGHTS_FILE
            self.best = load_file(best) if best.exists() else weights
        path = directory / names.OPTIMIZER_FILE
        self.held.set_optimizer_state(load_file(path) if self.ranks.is_first else {})
        RandomState(load_file(directory / names.RANDOM_STATE_FILE)).restore()


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """The training state of one moment, in the process that writes it."""

    loop: dict[str, object]
    parameters: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    best: dict[str, Tensor]
    """The best parameters so far, where they are not `parameters`."""

    def write(self, directory: Path, random_state: "RandomState") -> None:
        """Write everything into `directory`."""
        save_file(_contiguous(self.parameters), directory / names.WEIGHTS_FILE)
        if self.best:
            save_file(_contiguous(self.best), directory / names.BEST_WEIGHTS_FILE)
        save_file(_contiguous(self.optimizer), directory / names.OPTIMIZER_FILE)
        save_file(random_state.tensors, directory / names.RANDOM_STATE_FILE)
        text = json.dumps(self.loop, indent=2)
        (directory / names.LOOP_STATE_FILE).write_text(text, encoding="utf-8")


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


def _contiguous(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.contiguous() for name, value in tensors.items()}
