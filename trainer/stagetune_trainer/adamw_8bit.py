"""AdamW whose moments take a byte each: torchao's arithmetic, run eagerly on plain tensors.

torchao's own optimizer compiles its step when it is first taken, which needs a compiler in the
image and a minute of each stage, and keeps its state in tensor subclasses that no safetensors file
holds. Here the state is plain tensors, wrapped only while one parameter is updated, so a checkpoint
treats them like any others.
"""

import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from stagetune_trainer.large_packages import reveal

BLOCK_SIZE = 256
"""Values that share a scale; the block-wise dynamic quantisation of arXiv 2110.02861."""
MIN_QUANTISED_SIZE = 4096
"""Smaller tensors keep fp32 moments, as in torchao and bitsandbytes: they take no room."""
_CHUNK_SIZE = 2**24
"""Values updated at once, whole blocks: the arithmetic holds some eight fp32 copies of them."""
_MOMENTS = {"exp_avg": True, "exp_avg_sq": False}
"""The moments' names, and whether their values have a sign."""


class AdamW8bit(Optimizer):
    """AdamW (arXiv 1711.05101) with 8-bit moments, and stochastic rounding of bf16 parameters.

    The arithmetic is in fp32. A bf16 parameter takes the neighbour above or below at random, so
    that its mean over many steps is right and small updates are not lost (arXiv 2010.06192). The
    random numbers are those of torch's generator on the parameter's device, which a checkpoint
    holds.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        *,
        lr: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        self._update, self._quantised, self._code_values = _import_torchao()
        self._code_tables: dict[tuple[torch.device, bool], Tensor] = {}
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step_one(parameter, group)

    def _step_one(self, parameter: nn.Parameter, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state.update(_new_state(parameter))
        state["step"] += 1
        # A view, so that the parameter itself changes; weights are always contiguous.
        values, gradient = parameter.detach().view(-1), parameter.grad
        if gradient is None:
            raise ValueError("a parameter without a gradient cannot be updated")
        gradients = gradient.reshape(-1)
        for start in range(0, values.numel(), _CHUNK_SIZE):
            chunk = slice(start, start + _CHUNK_SIZE)
            self._update(
                values[chunk],
                gradients[chunk],
                state["step"],
                *(self._moment(state, name, chunk) for name in _MOMENTS),
                None,
                torch.tensor(group["lr"], dtype=torch.float32),
                *group["betas"],
                group["weight_decay"],
                group["eps"],
                True,
                parameter.dtype is torch.bfloat16,
            )

    def _moment(self, state: dict[str, Tensor], name: str, chunk: slice) -> Tensor:
        """Return a part of a moment as the arithmetic takes it; writing to it changes `state`."""
        if name in state:
            return state[name].view(-1)[chunk]
        codes = state[f"{name}_codes"].view(-1)[chunk]
        scale = state[f"{name}_scale"][chunk.start // BLOCK_SIZE : chunk.stop // BLOCK_SIZE]
        table = self._code_table(codes.device, _MOMENTS[name])
        return self._quantised(codes, scale, table, _MOMENTS[name], torch.float32)

    def _code_table(self, device: torch.device, signed: bool) -> Tensor:
        """Return the value in [-1, 1] or [0, 1] of each of the 256 codes."""
        key = (device, signed)
        if key not in self._code_tables:
            values = self._code_values(signed=signed)
            self._code_tables[key] = torch.tensor(values, dtype=torch.float32, device=device)
        return self._code_tables[key]


def _new_state(parameter: Tensor) -> dict[str, Tensor]:
    """Return the state before the first step: all moments zero."""
    # On the device, where a checkpoint puts it back: a GPU divides by a number of the host's with
    # other bits.
    state = {"step": torch.tensor(0.0, device=parameter.device)}
    is_quantised = parameter.numel() >= MIN_QUANTISED_SIZE and parameter.numel() % BLOCK_SIZE == 0
    for name in _MOMENTS:
        if is_quantised:
            num_blocks = parameter.numel() // BLOCK_SIZE
            state[f"{name}_codes"] = torch.zeros_like(parameter, dtype=torch.uint8)
            # With a scale of zero any code is a zero.
            state[f"{name}_scale"] = torch.zeros(num_blocks, device=parameter.device)
        else:
            # Never bf16: there the slow mean of squares would stand still.
            state[name] = torch.zeros_like(parameter, dtype=torch.float32)
    return state


def _import_torchao() -> tuple[Callable[..., None], Callable[..., Tensor], Callable[..., Any]]:
    """Return torchao's update of one parameter, its quantised tensor, and the codes' values."""
    reveal("torchao")
    with warnings.catch_warnings():
        # Its docstrings have invalid escapes, which the first compilation to bytecode warns of.
        warnings.simplefilter("ignore")
        from torchao.optim.adam import single_param_adam
        from torchao.optim.quant_utils import create_dynamic_map
        from torchao.optim.subclass_8bit import OptimState8bit
    return single_param_adam, OptimState8bit, create_dynamic_map
