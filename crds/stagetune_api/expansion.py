"""Where the blocks of an expanded decoder stand (method Expand, LLaMA Pro, arXiv 2401.02415).

After every `layersPerBlock` layers of the base one block is added. Manifests, plans and reports
count layers as in the base, from 0; `expanded_index` and `block_indices` say where the layers and
the blocks stand in the deeper model. Plan and trainer count by the same functions.
"""

from stagetune_api.training_spec import LayerRange


def num_blocks(num_layers: int, layers_per_block: int) -> int:
    """Return how many blocks a base of `num_layers` layers gets; layers left over get none."""
    return num_layers // layers_per_block


def expanded_index(layer: int, layers_per_block: int) -> int:
    """Return the index in the expanded decoder of the base's layer `layer`."""
    return layer + layer // layers_per_block


def block_indices(layers: LayerRange, layers_per_block: int) -> list[int]:
    """Return the indices in the expanded decoder of the blocks that stand behind `layers`.

    A block stands directly behind the layer that it is a copy of and belongs to that layer's stage.
    """
    return [
        expanded_index(layer, layers_per_block) + 1
        for layer in range(layers.first, layers.last + 1)
        if (layer + 1) % layers_per_block == 0
    ]
