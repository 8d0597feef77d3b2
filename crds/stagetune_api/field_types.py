"""Types of fields that more than one section of the manifest has."""

from typing import Annotated

from pydantic import Field, StringConstraints

SourceUri = Annotated[
    str,
    StringConstraints(max_length=2048, pattern=r"^(hf|ms|s3|pvc|file)://.+$"),
]
Fraction = Annotated[float, Field(ge=0, le=1)]
