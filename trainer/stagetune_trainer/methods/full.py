"""`Full`: the weights of the stage's layers train."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from stagetune_api.stage import PlannedStage
from stagetune_api.training_spec import LayerRange
from stagetune_trainer.decoder import Decoder
from stagetune_trainer.methods import Method


class FullMethod(Method):
    """Opens whole layers, and the embeddings or the final norm and head where the stage says so."""

    def __init__(self, master_dtype: torch.dtype = torch.float32) -> None:
        self._master_dtype = master_dtype
        self._handed_on_dtype = torch.float32

    def open(self, decoder: Decoder, stage: PlannedStage) -> dict[str, nn.Parameter]:
        """Make the stage's parameters trainable, and return them by their model name.

        Masters are fp32 whatever the model computes in, unless the optimizer rounds stochastically:
        in bf16 a small update rounds away.
        """
        self._handed_on_dtype = decoder.model.dtype
        modules = self.modules(decoder, stage)
        wanted = {id(parameter) for module in modules for parameter in module.parameters()}
        opened = {}
        for name, parameter in decoder.model.named_parameters():
            if id(parameter) in wanted:
                parameter.data = parameter.data.to(self._master_dtype)
                parameter.requires_grad_(True)
                opened[name] = parameter
        return opened

    def modules(self, decoder: Decoder, stage: PlannedStage) -> list[nn.Module]:
        """Return the modules that the stage opens."""
        modules = [module for _, module in decoder.opened(stage)]
        if stage.embeddings:
            modules.append(decoder.embeddings)
        if stage.head:
            modules += [*decoder.final_norms, decoder.head]
        return modules

    def output(self, decoder: Decoder, trained: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the trained tensors in the number format that the frozen model computes in."""
        return {name: tensor.to(self._handed_on_dtype) for name, tensor in trained.items()}

    @torch.no_grad()
    def apply(self, decoder: Decoder, layers: LayerRange, tensors: Mapping[str, Tensor]) -> None:
        """Overwrite the base's weights with a finished stage's."""
        parameters = dict(decoder.model.named_parameters())
        for name, tensor in tensors.items():
            parameters[name].copy_(tensor)
