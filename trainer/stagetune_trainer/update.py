"""How a step's gradients become an update: all at once, or each as soon as it is there.

The loop calls `begin`, `backward` for each micro-batch, `gradient_norm`, and `apply` if all numbers
are finite.
"""

import math
from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from stagetune_api.training_spec import TrainingSpec


class Update(Protocol):
    """One optimizer step after the other."""

    when_not_finite: str
    """What a step whose numbers are not finite leaves behind, for people."""

    def begin(self, learning_rate: float) -> None:
        """Begin a step that is taken at `learning_rate`."""

    def backward(self, loss: Tensor, *, is_last: bool = True) -> None:
        """Compute the gradients of `loss`, a scalar; of several losses their sum counts.

        `is_last` says that no other loss of the step follows.
        """

    def gradient_norm(self) -> float:
        """Return the norm of all gradients of the step before clipping, and clip them."""

    def apply(self) -> None:
        """Update the parameters and drop the gradients."""


def make_update(
    training: TrainingSpec, parameters: Mapping[str, nn.Parameter], optimizer: Optimizer
) -> Update:
    """Return the way of updating that `training` asks for."""
    kind = BackwardUpdate if training.optimizer_in_backward else AccumulatedUpdate
    return kind(list(parameters.values()), optimizer, training.max_grad_norm)


def _set_rate(optimizer: Optimizer, learning_rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = learning_rate


class AccumulatedUpdate:
    """Gradients add up over the micro-batches of a step, are clipped together and then applied."""

    when_not_finite = "The step was not applied."

    def __init__(
        self, parameters: list[nn.Parameter], optimizer: Optimizer, max_grad_norm: float
    ) -> None:
        self._parameters = parameters
        self._optimizer = optimizer
        self._max_grad_norm = max_grad_norm

    def begin(self, learning_rate: float) -> None:
        """Set the rate."""
        _set_rate(self._optimizer, learning_rate)

    def backward(self, loss: Tensor, *, is_last: bool = True) -> None:
        """Add the gradients of `loss` to those of the step's other micro-batches."""
        loss.backward()  # type: ignore[no-untyped-call]

    def gradient_norm(self) -> float:
        """Return the norm of all gradients together, and clip that to the bound."""
        return torch.nn.utils.clip_grad_norm_(self._parameters, self._max_grad_norm).item()

    def apply(self) -> None:
        """Update every parameter."""
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)


class BackwardUpdate:
    """Each parameter is updated in the backward pass, and its gradient freed (LOMO, arXiv
    2306.09782): no two gradients stand at once. For steps of one micro-batch.

    Each gradient is clipped by its own norm, since that of all is known only when they are gone.
    After the first number that is not finite nothing is updated any more.
    """

    when_not_finite = "Nothing of the step was saved; the last checkpoint stands."

    def __init__(
        self, parameters: list[nn.Parameter], optimizer: Optimizer, max_grad_norm: float
    ) -> None:
        self._optimizer = optimizer
        self._max_grad_norm = max_grad_norm
        self._squared_norm = 0.0
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(self._take)  # type: ignore[no-untyped-call]

    def begin(self, learning_rate: float) -> None:
        """Set the rate."""
        _set_rate(self._optimizer, learning_rate)
        self._squared_norm = 0.0

    def backward(self, loss: Tensor, *, is_last: bool = True) -> None:
        """Compute the gradients of `loss` and update with each, unless the loss is not finite."""
        if math.isfinite(float(loss.detach())):
            loss.backward()  # type: ignore[no-untyped-call]

    def _take(self, parameter: Tensor) -> None:
        """Update `parameter`, the only one that has a gradient."""
        norm = torch.nn.utils.clip_grad_norm_([parameter], self._max_grad_norm).item()
        self._squared_norm += norm**2
        if math.isfinite(self._squared_norm):
            # It passes over all parameters without a gradient.
            self._optimizer.step()
        parameter.grad = None

    def gradient_norm(self) -> float:
        """Return the norm of all gradients of the step together."""
        return math.sqrt(self._squared_norm)

    def apply(self) -> None:
        """Do nothing: the updates are done."""
