"""What a plan needs to know about a model and its data, and nothing more.

Prepare measures both; `stagetune_operator.model_facts` derives the first from a bare `config.json`
so that a plan can be shown before anything is downloaded.
"""

from typing import Annotated

from pydantic import Field

from stagetune_api.base import ApiModel

Count = Annotated[int, Field(ge=0)]


class LayerFacts(ApiModel):
    """One decoder layer; all layers of a model are taken to be alike."""

    parameters: Count
    """parameters of one layer, norms and biases included."""
    linear_shapes: Annotated[dict[str, tuple[int, int]], Field(max_length=64)]
    """linearShapes maps each linear module's name to (inputs, outputs)."""


class ModelFacts(ApiModel):
    """The shape of a decoder-only language model."""

    model_type: str
    """modelType as in config.json, e.g. `qwen2`."""
    num_layers: Annotated[int, Field(ge=1)]
    """numLayers of the decoder."""
    hidden_size: Annotated[int, Field(ge=1)]
    """hiddenSize of the residual stream."""
    intermediate_size: Annotated[int, Field(ge=1)]
    """intermediateSize of the feed-forward block."""
    vocab_size: Annotated[int, Field(ge=1)]
    """vocabSize, the head's number of outputs."""
    num_attention_heads: Annotated[int, Field(ge=1)]
    """numAttentionHeads of one layer."""
    head_dim: Annotated[int, Field(ge=1)]
    """headDim of one attention head."""
    tied_embeddings: bool
    """tiedEmbeddings says whether the head shares its matrix with the embeddings."""
    layer: LayerFacts
    """layer of the decoder."""
    embedding_parameters: Count
    """embeddingParameters of the input embeddings."""
    head_parameters: Count
    """headParameters that the head has beside the embeddings: 0 where it is tied."""
    final_norm_parameters: Count
    """finalNormParameters of the norm between the last layer and the head."""
    dtype_bytes: Annotated[int, Field(ge=1, le=8)]
    """dtypeBytes of one stored weight."""
    digest: str | None = None
    """digest of the prepared weights; absent where only config.json is known."""

    @property
    def parameters(self) -> int:
        """All parameters of the model."""
        return (
            self.num_layers * self.layer.parameters
            + self.embedding_parameters
            + self.head_parameters
            + self.final_norm_parameters
        )


class DataFacts(ApiModel):
    """Sizes of the tokenised data."""

    train_rows: Count
    """trainRows that are left after dropping."""
    validation_rows: Count
    """validationRows that are left after dropping."""
    train_tokens: Count
    """trainTokens of all training rows, template included."""
    train_answer_tokens: Count
    """trainAnswerTokens on which the loss is computed."""
    max_row_tokens: Count
    """maxRowTokens is the length of the longest row."""
    replay_rows: Count = 0
    """replayRows of other text that is mixed into training."""
    replay_tokens: Count = 0
    """replayTokens of those rows."""
    max_general_tokens: Count = 0
    """maxGeneralTokens is the length of the longest row of general text."""
    digest: str | None = None
    """digest of the tokenised rows; absent where the sizes are assumed."""


class GradientFacts(ApiModel):
    """The profile of gradient norms that order GradientNorm is decided by."""

    relative_norms: Annotated[list[Annotated[float, Field(ge=0)]], Field(max_length=1024)]
    """relativeNorms of the decoder layers, bottom to top: the norm of a layer's gradient over the
    norm of its weights, the mean over all micro-batches, to four digits."""
    rows: Count
    """rows of the training set that were measured; 0 where the profile is assumed."""
    tokens: Count
    """tokens of those rows."""


class Facts(ApiModel):
    """All that prepare hands to the plan."""

    model: ModelFacts
    """model that the run starts from."""
    data: DataFacts
    """data that the run trains on."""
    model_directory: str
    """modelDirectory of the prepared base model."""
    process_bytes: Annotated[int, Field(ge=1)] | None = None
    """processBytes that were resident when prepare had loaded its code and nothing else: what a
    stage on a CPU finds too. Absent where prepare has not measured them."""
    gradients: GradientFacts | None = None
    """gradients of the base model on the data; only where the schedule asks for them."""
