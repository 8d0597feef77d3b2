"""The anchor: keep what a stage hands to the layers above it close to what the base handed them.

The layers above were trained on the base's hidden states at the stage's upper border. The anchor's
loss is the squared distance of the hidden state from the base's over the base's own square, token
by token: relative, since some tokens (the first of a row above all) are a thousand times as large
as others and a mean of plain squares would see only them.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stagetune_api import names
from stagetune_api.artifact import ArtifactKind
from stagetune_trainer.data.batch import Batch, collate
from stagetune_trainer.data.store import RowReader
from stagetune_trainer.decoder import Decoder
from stagetune_trainer.model import Numerics
from stagetune_trainer.protect.teacher import batches_of
from stagetune_trainer.references import Reference, ReferenceFolder
from stagetune_trainer.tensor_file import RowTensors, TensorFileWriter, row_offsets


class BorderTap:
    """Takes the hidden states [B, T, hidden] that leave a layer, when it is asked to.

    With gradient checkpointing the layer runs once more in the backward pass; nothing is taken
    then.
    """

    def __init__(self, layer: nn.Module) -> None:
        self._armed = False
        self._taken: Tensor | None = None
        self._hook = layer.register_forward_hook(self._take)

    def arm(self) -> None:
        """Take what leaves the layer in the next forward pass."""
        self._armed = True

    def taken(self) -> Tensor:
        """Return what was taken since; raises ValueError where the layer has not run."""
        hidden, self._taken = self._taken, None
        if hidden is None:
            raise ValueError("the layer at the border has not run")
        return hidden

    def close(self) -> None:
        """Let go of the layer."""
        self._hook.remove()

    def _take(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if self._armed:
            # Some families' layers return a tuple that begins with the hidden states.
            self._taken = output if isinstance(output, Tensor) else output[0]
            self._armed = False


class Anchor:
    """The distance of a stage's upper border from the base model's."""

    def __init__(self, path: Path, layer: nn.Module) -> None:
        """`path` holds the base's hidden states behind the layer that `layer` now is."""
        self._tensors = RowTensors(path)
        self._tap = BorderTap(layer)

    def arm(self) -> None:
        """Look at the next forward pass."""
        self._tap.arm()

    def close(self) -> None:
        """Let go of the layer and of the file."""
        self._tap.close()
        del self._tensors

    def distance_sum(self, batch: Batch) -> Tensor:
        """Return the relative squared distances of that pass over `batch`, summed over tokens.

        An fp32 scalar; padding does not count.
        """
        hidden = self._tap.taken()
        found = hidden[batch.is_token(hidden.device)].float()
        expected = self._tensors.rows("hidden", batch.rows).to(hidden.device).float()
        size = expected.square().sum(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)
        return ((found - expected).square().sum(dim=-1) / size).sum()


def store_hidden_states(
    folder: ReferenceFolder,
    decoder: Decoder,
    numerics: Numerics,
    rows: RowReader,
    *,
    layer: int,
    indices: list[int],
    micro_batch_size: int,
    before_batch: Callable[[], None] = lambda: None,
) -> Path:
    """Return the file with the base's hidden states behind `layer`, computed where it is missing.

    Every token of the rows `indices` takes 2 * hidden bytes in bf16, other rows none. `decoder` is
    the bare base model, and `before_batch` may raise to give up.
    """

    def write(directory: Path) -> None:
        tap = BorderTap(decoder.layers[layer])
        lengths = torch.zeros(len(rows), dtype=torch.int64)
        lengths[indices] = torch.from_numpy(rows.lengths[indices])
        offsets = row_offsets(lengths)
        hidden_size = decoder.head_weight.shape[1]
        writer = TensorFileWriter(
            directory / names.HIDDEN_STATES_FILE,
            {
                "offsets": (torch.int64, (len(offsets),)),
                "hidden": (torch.bfloat16, (int(offsets[-1]), hidden_size)),
            },
        )
        writer.write("offsets", 0, offsets)
        for part in batches_of(rows, indices, micro_batch_size):
            before_batch()
            batch = collate([rows[row] for row in part], rows=part)
            tap.arm()
            with torch.no_grad(), numerics.autocast():
                decoder.backbone(input_ids=batch.input_ids.to(numerics.device), use_cache=False)
            hidden = tap.taken()
            for place, (row, length) in enumerate(zip(part, batch.lengths, strict=True)):
                writer.write("hidden", int(offsets[row]), hidden[place, :length])
        writer.close()
        tap.close()

    directory = folder.obtain(anchor_reference(layer, indices), write)
    return directory / names.HIDDEN_STATES_FILE


def anchor_reference(layer: int, indices: list[int]) -> Reference:
    """Return what the file of a stage's anchor is called, and what decides its numbers."""
    return Reference(
        name=names.StageLayout(Path()).anchor.name,
        kind=ArtifactKind.HIDDEN_STATES,
        settings={"layer": layer, "rows": sorted(indices)},
    )
