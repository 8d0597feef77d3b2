"""DeepSpeed's ZeRO (arXiv 1910.02054): several processes share what a stage's training takes.

Stage 2 divides gradients and optimizer states, stage 3 the weights of the layers too, frozen ones
included. Comes after the stage's parameters are open and its optimizer is built. Checkpoints hold
whole tensors by name, as those of one process do, so any number of processes goes on from them.

What DeepSpeed leaves to its caller, found by trying 0.19.8:
- an optimizer's state can be asked for by parameter only once it is there and linked, which its own
  first step does for the first parameter group alone; so the state is made here, all zeros;
- its forward pass turns autocast off, so it is turned on again inside;
- it keeps small parameters whole and gathers them in one number format, which rounds fp32 adapters
  beside bf16 norms; so none are kept whole.
"""

import logging
import os
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from stagetune_api.spec import Offload
from stagetune_api.stage import EnginePlan
from stagetune_trainer.decoder import Decoder
from stagetune_trainer.large_packages import reveal
from stagetune_trainer.model import Numerics
from stagetune_trainer.ranks import Ranks
from stagetune_trainer.tail_model import lowest_loaded
from stagetune_trainer.training_state import state_of

_STEP = "step"
"""Key of the number of steps in an optimizer's state, which all parameters share."""
_MOMENTS = ("exp_avg", "exp_avg_sq")
_BUCKET_SIZE = 50_000_000


@dataclass(frozen=True, kw_only=True)
class DeepSpeedStage:
    """A stage's parameters in DeepSpeed's hands: an `Update` and a `HeldTensors`."""

    engine: Any
    optimizer: Any
    """DeepSpeed's wrapper of the optimizer."""
    opened: Mapping[str, nn.Parameter]
    shapes: Mapping[str, torch.Size]
    """Shapes of the whole parameters."""
    partitions: list[Tensor]
    """The fp32 parts that this process updates, one for each parameter group or part of one."""
    ranks: Ranks
    is_partitioned: bool
    """Whether weights are divided too (stage 3)."""

    when_not_finite = "The step was not applied."

    def begin(self, learning_rate: float) -> None:
        """Set the rate."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate

    def backward(self, loss: Tensor, *, is_last: bool = True) -> None:
        """Add the gradients of `loss` to those of the step's other micro-batches."""
        self.engine.set_gradient_accumulation_boundary(is_last)
        # It takes the mean over processes, and the loss is divided by the whole batch's counts.
        self.engine.backward(loss * self.ranks.count)

    def gradient_norm(self) -> float:
        """Return the norm of all gradients of the step before clipping, and take the step.

        It is one call to DeepSpeed, which leaves everything as it is where the norm is not finite.
        """
        self.engine.step()
        norm = float("inf") if self.optimizer.overflow else self.engine.get_global_grad_norm()
        return float(norm)

    def apply(self) -> None:
        """Do nothing: the step is taken."""

    def parameters(self, *, copy: bool = False) -> dict[str, Tensor]:
        """Return the whole parameters in host memory, to the first process."""
        from deepspeed.utils import safe_get_full_fp32_param

        return self._gathered(
            (name, safe_get_full_fp32_param(parameter)) for name, parameter in self.opened.items()
        )

    def set_parameters(self, tensors: Mapping[str, Tensor]) -> None:
        """Overwrite the parameters with the first process's `tensors`."""
        from deepspeed.runtime.zero import GatheredParameters

        for name, parameter in self.opened.items():
            value = self._from_first(name, tensors.get(name)).to(parameter.device)
            self._set(parameter, value, None)
            # Beside that stand the weights that the model computes with.
            with GatheredParameters([parameter], modifier_rank=0, enabled=self.is_partitioned):
                if self.ranks.is_first or not self.is_partitioned:
                    parameter.data.copy_(value)

    def optimizer_state(self) -> dict[str, Tensor]:
        """Return the whole state in host memory, to the first process."""
        from deepspeed.utils import safe_get_full_optimizer_state

        state = self._gathered(
            (f"{name}.{key}", safe_get_full_optimizer_state(parameter, key))
            for name, parameter in self.opened.items()
            for key in _MOMENTS
        )
        if self.ranks.is_first:
            step = self._state_of(self.partitions[0])[_STEP].detach().cpu()
            state |= {f"{name}.{_STEP}": step.clone() for name in self.opened}
        return state

    def set_optimizer_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Overwrite the state with the first process's `tensors`, if there are any."""
        if not self.ranks.any(bool(tensors)):
            return
        steps = 0.0
        for name, parameter in self.opened.items():
            state = state_of(name, tensors)
            (steps,) = self.ranks.of_first([float(state.get(_STEP, torch.tensor(0.0)))])
            for key in _MOMENTS:
                value = self._from_first(name, state.get(key)).to(parameter.device)
                self._set(parameter, value, key)
        for partition in self.partitions:
            self._state_of(partition)[_STEP].fill_(steps)

    def _set(self, parameter: nn.Parameter, value: Tensor, key: str | None) -> None:
        """Overwrite a parameter's fp32 master, or what its optimizer's state has under `key`."""
        from deepspeed import utils

        if not self.is_partitioned:
            if key is None:
                utils.safe_set_full_fp32_param(parameter, value)
            else:
                utils.safe_set_full_optimizer_state(parameter, value, key)
            return
        # Its own way for whole tensors fails where the processes do not divide their size.
        held: Any = parameter
        size = held.ds_tensor.numel()
        whole = value.new_zeros(size * self.ranks.count)
        whole[: value.numel()] = value.flatten()
        part = whole[size * self.ranks.rank : size * (self.ranks.rank + 1)]
        if key is None:
            utils.safe_set_local_fp32_param(parameter, part)
        else:
            utils.safe_set_local_optimizer_state(parameter, part, key)

    def _gathered(self, tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
        # One after the other, so that no more than one is whole on the device.
        return {
            name: tensor.detach().to("cpu", copy=True).reshape(self._shape(name))
            for name, tensor in tensors
            if self.ranks.is_first
        }

    def _shape(self, name: str) -> torch.Size:
        parameter = name if name in self.shapes else name.rpartition(".")[0]
        return self.shapes[parameter]

    def _from_first(self, name: str, tensor: Tensor | None) -> Tensor:
        """Return the first process's tensor of the parameter `name`, fp32 in host memory."""
        if tensor is None or not self.ranks.is_first:
            tensor = torch.empty(self.shapes[name])
        tensor = tensor.float().contiguous()
        self.ranks.broadcast(tensor)
        return tensor

    def _state_of(self, partition: Tensor) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.optimizer.optimizer.state[partition]
        return state


def share_stage(
    plan: EnginePlan,
    decoder: Decoder,
    parameters: Mapping[str, nn.Parameter],
    optimizer: Optimizer,
    numerics: Numerics,
    ranks: Ranks,
    *,
    max_grad_norm: float,
) -> DeepSpeedStage:
    """Hand a stage's open parameters and their AdamW over to DeepSpeed.

    Every process calls this with equal weights. With ZeRO stage 3 the decoder's layers have no
    weights of their own afterwards: they are gathered for each pass, which all processes have to
    make together.
    """
    deepspeed = _import_deepspeed(numerics.device.type)
    shapes = {name: parameter.shape for name, parameter in parameters.items()}
    is_partitioned = plan.zero_stage == 3
    shared: nn.Module = _Opened(parameters.values())
    if is_partitioned:
        shared = _Layers(decoder, numerics)
    engine, wrapper, _, _ = deepspeed.initialize(
        model=shared, optimizer=optimizer, config=_settings(plan, max_grad_norm)
    )
    if is_partitioned:
        decoder.backbone.forward = engine.__call__
        partitions = list(wrapper.fp32_partitioned_groups_flat)
    else:
        partitions = list(wrapper.single_partition_of_fp32_groups)
    for partition in partitions:
        zeros = {key: torch.zeros_like(partition) for key in _MOMENTS}
        step = torch.zeros((), dtype=torch.float32, device=partition.device)
        wrapper.optimizer.state[partition] = {_STEP: step, **zeros}
    if not is_partitioned:
        wrapper._lazy_init_hp_params_optimizer_state()
    return DeepSpeedStage(
        engine=engine,
        optimizer=wrapper,
        opened=parameters,
        shapes=shapes,
        partitions=partitions,
        ranks=ranks,
        is_partitioned=is_partitioned,
    )


def _settings(plan: EnginePlan, max_grad_norm: float) -> dict[str, Any]:
    zero: dict[str, Any] = {
        "stage": plan.zero_stage,
        "contiguous_gradients": True,
        # Numbers, 200 MB of them: by default a buffer of 2 GB is made for the smallest stage.
        "reduce_bucket_size": _BUCKET_SIZE,
        "allgather_bucket_size": _BUCKET_SIZE,
        "stage3_param_persistence_threshold": 0,
    }
    if plan.offload is not Offload.NONE:
        zero["offload_optimizer"] = {"device": "cpu"}
    if plan.offload is Offload.OPTIMIZER_AND_PARAMETERS:
        zero["offload_param"] = {"device": "cpu"}
    return {
        # The loop deals out micro-batches and says which one is the last of a step.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": max_grad_norm,
        "communication_data_type": "fp32",
        "zero_optimization": zero,
        # torch's fused AdamW also where moments are in host memory: DeepSpeed's own would have to
        # be compiled in the pod, and the image has no compiler.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


def _import_deepspeed(device: str) -> Any:
    """Return the package, quiet, and kept from compiling an extension of its own at run time."""
    os.environ.setdefault("DS_ACCELERATOR", device)
    reveal("deepspeed")
    import deepspeed

    logger = logging.getLogger("DeepSpeed")
    logger.setLevel(logging.WARNING)
    for handler in logger.handlers:
        if isinstance(handler, logging.StreamHandler):
            # Standard output belongs to the lines of progress.
            handler.setStream(sys.stderr)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


class _Opened(nn.Module):
    """The parameters of a stage, and nothing else of the model."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        super().__init__()
        for number, parameter in enumerate(parameters):
            self.register_parameter(f"opened{number}", parameter)


class _Layers(nn.Module):
    """The decoder's pass as DeepSpeed sees it: the layers that have weights are its own.

    Embeddings, final norm and head stay whole in every process: the loss takes the head's matrix
    without a pass through its module.
    """

    def __init__(self, decoder: Decoder, numerics: Numerics) -> None:
        super().__init__()
        self.layers = nn.ModuleList(decoder.layers[lowest_loaded(decoder) :])
        # As a bound method, so that torch does not take the backbone for a part of this module.
        self._run = decoder.backbone.forward
        self._numerics = numerics

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the decoder returns."""
        with self._numerics.autocast():
            return self._run(*args, **kwargs)
