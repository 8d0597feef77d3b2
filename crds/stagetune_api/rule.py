"""What one rule of the CRD is; `rules` and its parts hold them all."""

from typing import NamedTuple


class Rule(NamedTuple):
    """One entry of `x-kubernetes-validations`."""

    path: str
    """Where the rule stands and what its `self` is: `spec.stages[].layers`; "" is the object."""
    rule: str
    """The CEL expression that must hold."""
    message: str
    """What is wrong and the cure."""
    field_path: str = ""
    """The field to point at, from `path`; empty: `path` itself."""
