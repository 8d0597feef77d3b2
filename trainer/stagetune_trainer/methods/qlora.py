"""`QLoRA`: adapters train beside frozen linear modules in 4 bits (arXiv 2305.14314)."""

import torch
from torch import nn

from stagetune_trainer.decoder import Decoder
from stagetune_trainer.methods.lora import LoraMethod
from stagetune_trainer.methods.nf4 import Nf4Linear


class QloraMethod(LoraMethod):
    """LoRA whose base takes a quarter of its bytes while it trains.

    What is handed on are the adapters. At export they stand on the base's own weights, for which
    they are no worse: what 4 bits lost is not in them (docs/methods/qlora.md).
    """

    def compress(self, decoder: Decoder, device: torch.device) -> None:
        """Hold the linear modules of all layers in NF4 on `device`, one matrix after the other.

        Embeddings, norms, biases and head keep their format.
        """
        for layer in decoder.layers:
            for name, module in list(layer.named_modules()):
                if isinstance(module, nn.Linear) and not module.weight.is_meta:
                    parent, _, child = name.rpartition(".")
                    setattr(layer.get_submodule(parent), child, Nf4Linear(module, device))
        if device.type == "cpu":
            for parameter in decoder.model.parameters():
                # What keeps its format would keep the whole file mapped, read pages and all.
                parameter.data = parameter.data.clone()
