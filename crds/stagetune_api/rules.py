"""Rules over more than one field, as CEL that the API server evaluates at admission.

They are `validation.check_spec` once more, so that `kubectl apply` refuses at once what the
operator would have to refuse later; a test holds the two together. Not here: values that the API
names and no program does yet. That is a matter of the program's version, and an old CRD must not
refuse what a newer program can do.

Core CEL only, without Kubernetes' libraries, so that the rules can be tested without a server. The
server checks a field's default by the rules that stand on it *before* it fills in the defaults
inside; a rule that reads those defaults therefore stands on `spec`, which has none of its own.
"""

from typing import NamedTuple

from stagetune_api import names
from stagetune_api.spec import MethodType, StagedFineTuneSpec
from stagetune_api.status import ConditionStatus, ConditionType


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


_USES_LORA = f"self.method.type in ['{MethodType.LORA}', '{MethodType.QLORA}']"
_DECODER_LAYERS_ONLY = (
    "adapters stand only in decoder layers; use method.type: Full or leave {} out"
)

SPEC_RULES = (
    Rule(
        "spec",
        "has(self.schedule) != has(self.stages)",
        "give exactly one of schedule and stages",
        ".schedule",
    ),
    Rule(
        "spec.schedule",
        "has(self.layersPerStage) != has(self.stageCount)",
        "give exactly one of layersPerStage and stageCount",
        ".layersPerStage",
    ),
    Rule(
        "spec.schedule",
        # A thousand-millionth of slack, so that three times 0.3333333334 is not too much.
        "self.dataPartition != 'Disjoint' || !has(self.dataFraction) || !has(self.stageCount) || "
        "self.dataFraction * double(self.stageCount) <= 1.000000001",
        "disjoint stages cannot see more rows than there are: dataFraction times stageCount is "
        "above 1; lower one of them or use dataPartition: Shared",
        ".dataFraction",
    ),
    Rule(
        "spec.model",
        "!has(self.revision) || !self.source.startsWith('file://')",
        "a file:// source has no revision, only hf:// and ms:// have; remove revision",
        ".revision",
    ),
    Rule(
        "spec.dataset",
        "!has(self.revision) || !self.source.startsWith('file://')",
        "a file:// source has no revision, only hf:// and ms:// have; remove revision",
        ".revision",
    ),
    Rule(
        "spec.dataset.validation",
        "has(self.fraction) != has(self.source)",
        "give exactly one of fraction and source",
    ),
    Rule(
        "spec.stages[].layers",
        "self.first <= self.last",
        "last is below first; both ends belong to the range",
        ".last",
    ),
    Rule(
        "spec.stages[]",
        "!self.embeddings || self.layers.first == 0",
        "the embeddings train with layer 0; set layers.first to 0 or leave embeddings out",
        ".embeddings",
    ),
    Rule(
        "spec.method",
        "!has(self.lora) || self.type in ['LoRA', 'QLoRA']",
        "lora is only for method.type LoRA or QLoRA; set type or remove lora",
        ".lora",
    ),
    Rule(
        "spec.method",
        "!has(self.expand) || self.type == 'Expand'",
        "expand is only for method.type Expand; set type or remove expand",
        ".expand",
    ),
    Rule(
        "spec",
        f"!({_USES_LORA}) || !has(self.schedule) || self.schedule.head == 'Never'",
        _DECODER_LAYERS_ONLY.format("schedule.head"),
        ".schedule.head",
    ),
    Rule(
        "spec",
        f"!({_USES_LORA}) || !has(self.schedule) || self.schedule.embeddings == 'Never'",
        _DECODER_LAYERS_ONLY.format("schedule.embeddings"),
        ".schedule.embeddings",
    ),
    Rule(
        "spec",
        f"!({_USES_LORA}) || !has(self.stages) || self.stages.all(s, !s.head && !s.embeddings)",
        _DECODER_LAYERS_ONLY.format("head and embeddings of every stage"),
        ".stages",
    ),
    Rule(
        "spec.training",
        "!has(self.learningRate) || !has(self.learningRateByDepth)",
        "learningRate and learningRateByDepth are both given; keep one of them",
        ".learningRate",
    ),
    Rule(
        "spec",
        "has(self.training.learningRate) || has(self.training.learningRateByDepth) || "
        "(has(self.stages) && self.stages.all(s, has(s.learningRate)))",
        "give training.learningRate or training.learningRateByDepth; 2e-5 to 1e-4 is usual for "
        "Full and 1e-4 to 1e-3 for LoRA",
        ".training.learningRate",
    ),
    Rule(
        "spec",
        "!has(self.training.learningRateByDepth) || !has(self.stages) || "
        "self.stages.all(s, !has(s.learningRate))",
        "training.learningRateByDepth already gives every stage a rate; remove it or the stages' "
        "learningRate",
        ".stages",
    ),
    Rule(
        "spec",
        "self.training.batchSize % self.training.microBatchSize == 0",
        "microBatchSize does not divide batchSize; use a divisor",
        ".training.microBatchSize",
    ),
    Rule(
        "spec",
        f"self.export.format != 'Adapter' || {_USES_LORA}",
        "export.format Adapter needs method.type LoRA or QLoRA; use Merged",
        ".export.format",
    ),
    Rule(
        "spec.runtime.resources.limits",
        # The schema can bound a map's values and their number, not its keys.
        "self.all(name, size(name) <= 128)",
        "a resource name is longer than 128 characters; shorten it",
    ),
)

NAME_RULE = Rule(
    "",
    f"size(self.metadata.name) <= {names.RUN_NAME_MAX_LENGTH} && "
    f"self.metadata.name.matches('{names.DNS_LABEL_PATTERN}')",
    f"metadata.name must be at most {names.RUN_NAME_MAX_LENGTH} characters of a-z, 0-9 and '-', "
    "with a letter or digit at both ends, because the names of the run's Jobs begin with it; "
    "choose such a name",
)

# On an update the server reads `oldSelf` with its stored status; on a create it skips these rules.
_STARTED = (
    "has(oldSelf.status) && has(oldSelf.status.conditions) && "
    "oldSelf.status.conditions.exists(c, "
    f"c.type == '{ConditionType.PREPARED}' && c.status == '{ConditionStatus.TRUE}')"
)
_ALWAYS_EDITABLE = {"suspend"}


def _frozen_rule(field: str) -> Rule:
    """Return the rule that `field` of the spec stays as it is, or absent, in a started run.

    It stands on the whole object: a rule on the field itself would not see the status, nor that
    the field was added or removed.
    """
    new, old = f"self.spec.{field}", f"oldSelf.spec.{field}"
    return Rule(
        "",
        f"!({_STARTED}) || (has({new}) == has({old}) && (!has({new}) || {new} == {old}))",
        f"spec.{field} cannot change once the run has started; undo the change, or apply it as a "
        "run with another name",
        f".spec.{field}",
    )


FROZEN_RULES = tuple(
    _frozen_rule(info.alias or name)
    for name, info in StagedFineTuneSpec.model_fields.items()
    if name not in _ALWAYS_EDITABLE
)

RULES = (NAME_RULE, *FROZEN_RULES, *SPEC_RULES)
