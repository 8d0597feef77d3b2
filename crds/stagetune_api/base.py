"""The two kinds of model in the contract: what users write and what programs exchange."""

from pydantic import BaseModel, ConfigDict
from pydantic.alias_generators import to_camel


class ApiModel(BaseModel):
    """A part of the contract: frozen, camelCase outside, and an unknown key is an error.

    The docstring under a field is its description in the CRD and in `kubectl explain`.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        alias_generator=to_camel,
        validate_by_name=True,
        validate_by_alias=True,
        serialize_by_alias=True,
        use_attribute_docstrings=True,
        protected_namespaces=(),
    )
