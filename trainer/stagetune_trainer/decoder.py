"""The parts of a Hugging Face decoder, found by structure and not by lists of names.

Comes after `model` has loaded the weights and before `methods` open some of them.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from stagetune_api.stage import PlannedStage
from stagetune_api.training_spec import LayerRange


@dataclass(frozen=True, kw_only=True)
class Decoder:
    """A decoder-only language model and where its parts are."""

    model: PreTrainedModel
    """The whole model, from token ids to logits."""
    backbone: nn.Module
    """The part that holds the layers: from token ids to `last_hidden_state` [B, T, hidden]."""
    layers: nn.ModuleList
    """The decoder layers, bottom to top."""
    layers_path: str
    """Where `layers` stands in the model, e.g. `model.layers`."""
    embeddings: nn.Module
    """Input embeddings: token ids [B, T] to [B, T, hidden]."""
    final_norms: tuple[nn.Module, ...]
    """What normalises the last layer's output."""
    head: nn.Module
    """Output embeddings: [N, hidden] to logits [N, vocabulary]."""
    head_weight: Tensor
    """The head's matrix [vocabulary, hidden]; that of the embeddings where they are tied."""

    @property
    def num_layers(self) -> int:
        """Number of decoder layers."""
        return len(self.layers)

    @property
    def is_tied(self) -> bool:
        """Whether the head's matrix is that of the embeddings."""
        return self.head_weight is self.embeddings.weight

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.head_weight.device

    def group(self, layers: LayerRange) -> Iterator[tuple[str, nn.Module]]:
        """Yield the layers of a stage with their full names, bottom to top.

        By index, since a name such as `model.layers.1` is the beginning of ten others.
        """
        for index in range(layers.first, layers.last + 1):
            yield f"{self.layers_path}.{index}", self.layers[index]

    def opened(self, stage: PlannedStage) -> Iterator[tuple[str, nn.Module]]:
        """Yield all layers that `stage` opens, those at the top too, each once, bottom up."""
        for layers in stage.layer_ranges:
            yield from self.group(layers)


def find_decoder(model: PreTrainedModel) -> Decoder:
    """Return the parts of `model`; raises ValueError where it is not built as decoders are."""
    num_layers = model.config.get_text_config().num_hidden_layers
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == num_layers
    ]
    head: nn.Module | None = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    head_weight = getattr(head, "weight", None)
    if not lists or head is None or not isinstance(head_weight, Tensor):
        raise ValueError(
            f"{type(model).__name__} has no list of {num_layers} decoder layers with a head above: "
            "it is not a decoder-only language model that stages can be cut from"
        )
    layers_path, layers = lists[0]
    backbone = model.get_submodule(layers_path.rpartition(".")[0])
    return Decoder(
        model=model,
        backbone=backbone,
        layers=layers,
        layers_path=layers_path,
        embeddings=model.get_input_embeddings(),
        final_norms=tuple(_final_norms(backbone, hidden=head_weight.shape[1])),
        head=head,
        head_weight=head_weight,
    )


def freeze_prefix(decoder: Decoder, first: int, *, embeddings_train: bool) -> None:
    """Run everything below layer `first` forward only, outside autograd and without dropout.

    The cut is structural: whatever asks for gradients at the embeddings (transformers' gradient
    checkpointing does, for every text model), autograd never walks into the prefix.
    """
    prefix: list[nn.Module] = list(decoder.layers[:first])
    if not embeddings_train:
        # Whatever else stands below the layers (a dropout, rotary tables) belongs to it.
        above = {id(module) for module in (decoder.layers, *decoder.final_norms)}
        prefix.append(decoder.embeddings)
        prefix += [
            child
            for child in decoder.backbone.children()
            if child is not decoder.embeddings and id(child) not in above
        ]
    for module in prefix:
        module.eval()
        module.forward = torch.no_grad()(module.forward)


def checkpoint_activations(decoder: Decoder, first: int) -> None:
    """Recompute the activations of layer `first` and above in the backward pass.

    transformers hooks the embeddings at the same time so that their output asks for gradients,
    which makes the prefix as dear as the rest; the hooks are removed again (docs/training.md).
    """
    decoder.model.activation_checkpointing_enable()
    decoder.model.disable_input_require_grads()  # type: ignore[no-untyped-call]
    for layer in decoder.layers[:first]:
        layer.gradient_checkpointing = False  # type: ignore[assignment]  # transformers' own flag


def _final_norms(backbone: nn.Module, hidden: int) -> Iterator[nn.Module]:
    """Yield the backbone's own normalisations: children whose parameters are all [hidden]."""
    for child in backbone.children():
        shapes = [tuple(parameter.shape) for parameter in child.parameters()]
        if shapes and all(shape == (hidden,) for shape in shapes):
            yield child
