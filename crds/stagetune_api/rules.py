"""Rules over more than one field, as CEL that the API server evaluates at admission.

They are `spec_checks.check_spec` once more, so that `kubectl apply` refuses at once what the
operator would have to refuse later; a test holds the two together. Not here: values that the API
names and no program does yet. That is a matter of the program's version, and an old CRD must not
refuse what a newer program can do.

Core CEL only, without Kubernetes' libraries, so that the rules can be tested without a server. The
server checks a field's default by the rules that stand on it *before* it fills in the defaults
inside; a rule that reads those defaults therefore stands on `spec`, which has none of its own.
"""

from stagetune_api import names
from stagetune_api.engine_rules import ENGINE_RULES
from stagetune_api.rule import Rule
from stagetune_api.schedule_rules import SCHEDULE_RULES
from stagetune_api.spec import StagedFineTuneSpec
from stagetune_api.status import ConditionStatus, ConditionType, StageState
from stagetune_api.training_rules import TRAINING_RULES

SPEC_RULES = (
    *TRAINING_RULES,
    *SCHEDULE_RULES,
    *ENGINE_RULES,
    Rule(
        "spec.model",
        "!has(self.revision) || self.source.startsWith('hf://') || "
        "self.source.startsWith('ms://') || self.source.startsWith('s3://')",
        "only hf:// and ms:// sources have revisions; remove revision",
        ".revision",
    ),
    Rule(
        "spec.dataset",
        "!has(self.revision) || self.source.startsWith('hf://') || "
        "self.source.startsWith('ms://') || self.source.startsWith('s3://')",
        "only hf:// and ms:// sources have revisions; remove revision",
        ".revision",
    ),
    Rule(
        "spec.dataset.validation",
        "has(self.fraction) != has(self.source)",
        "give exactly one of fraction and source",
    ),
    *(
        rule
        for field in ("limits", "requests")
        for rule in (
            Rule(
                f"spec.runtime.resources.{field}",
                # The schema can bound a map's values and their number, not its keys.
                "self.all(name, size(name) <= 128)",
                "a resource name is longer than 128 characters; shorten it",
            ),
            Rule(
                f"spec.runtime.resources.{field}",
                "self.all(name, !name.contains('/') || type(self[name]) == int || "
                "string(self[name]).matches('^[0-9]+$'))",
                "extended resources such as nvidia.com/gpu are only given out whole; give a whole "
                "number",
            ),
        )
    ),
    Rule(
        "spec.runtime.nodeSelector",
        "self.all(name, size(name) >= 1 && size(name) <= 317)",
        "a label's name is empty or longer than 317 characters; correct it",
    ),
    Rule(
        "spec.runtime.tolerations[]",
        "self.operator != 'Exists' || !has(self.value)",
        "operator Exists compares no value; remove it",
        ".value",
    ),
    Rule(
        "spec.runtime.tolerations[]",
        "self.operator != 'Equal' || has(self.key)",
        "operator Equal needs a key; add it, or use Exists",
        ".key",
    ),
    Rule(
        "spec.runtime.tolerations[]",
        "!has(self.tolerationSeconds) || (has(self.effect) && self.effect == 'NoExecute')",
        "only effect NoExecute waits; remove tolerationSeconds or set that",
        ".tolerationSeconds",
    ),
    Rule(
        "spec.storage",
        "has(self.size) != has(self.claimName)",
        "give exactly one of size and claimName",
        ".size",
    ),
    Rule(
        "spec.storage",
        "!has(self.claimName) || !has(self.storageClassName)",
        "a claim that is there already has its class; remove storageClassName",
        ".storageClassName",
    ),
    Rule(
        "spec.storage",
        "!has(self.claimName) || self.retain != 'Nothing'",
        "Nothing deletes the claim that was made for the run, and claimName names one that was "
        "not; use Result or Everything",
        ".retain",
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
    f"c.type == '{ConditionType.PLANNED}' && c.status == '{ConditionStatus.TRUE}')"
)
# The claim is made before there is a plan, and never made anew.
_HAS_CLAIM = (
    "has(oldSelf.status) && has(oldSelf.status.claimName) && size(oldSelf.status.claimName) > 0"
)
# `stages` has a rule of its own; the others take effect at the next Job.
_EDITABLE = {"suspend", "retry", "runtime", "stages"}


def _frozen_rule(field: str) -> Rule:
    """Return the rule that `field` of the spec stays as it is, or absent, in a started run.

    It stands on the whole object: a rule on the field itself would not see the status, nor that
    the field was added or removed.
    """
    new, old = f"self.spec.{field}", f"oldSelf.spec.{field}"
    started = f"({_STARTED}) || ({_HAS_CLAIM})" if field == "storage" else _STARTED
    return Rule(
        "",
        f"!({started}) || (has({new}) == has({old}) && (!has({new}) || {new} == {old}))",
        f"spec.{field} cannot change once the run has started; undo the change, or apply it as a "
        "run with another name",
        f".spec.{field}",
    )


FROZEN_RULES = tuple(
    _frozen_rule(info.alias or name)
    for name, info in StagedFineTuneSpec.model_fields.items()
    if name not in _EDITABLE
)


def _begun_stages(of: str) -> str:
    """Return the expression of those stages of `of` that the stored status says have begun."""
    return (
        f"{of}.spec.stages.filter(n, has(oldSelf.status.stages) && oldSelf.status.stages.exists(s, "
        f"s.name == n.name && has(s.state) && s.state != '{StageState.PENDING}'))"
    )


STAGES_RULE = Rule(
    "",
    # The last one at its old place means that none was put before it. `[x].all(count, ...)` is how
    # CEL gives x a name.
    f"!({_STARTED}) || (has(self.spec.stages) == has(oldSelf.spec.stages) && "
    f"(!has(self.spec.stages) || ({_begun_stages('self')} == {_begun_stages('oldSelf')} && "
    f"[size({_begun_stages('oldSelf')})].all(count, count == 0 || "
    "self.spec.stages[count - 1] == oldSelf.spec.stages[count - 1]))))",
    "spec.stages: a stage that has started keeps its fields and its place, and the run its list of "
    "stages; undo the change, or apply it as a run with another name",
    ".spec.stages",
)

_CLAIM_SOURCES = (
    *("model", "dataset", "dataset.validation"),
    *("evaluation.generalText", "protection.replay"),
)
_OPTIONAL_SOURCES = {"dataset.validation", "protection.replay"}
CLAIM_RULES = tuple(
    Rule(
        f"spec.{path}",
        ("!has(self.source) || " if path in _OPTIONAL_SOURCES else "")
        + "!self.source.startsWith('pvc://') || (self.source.matches("
        "'^pvc://[a-z0-9]([-a-z0-9.]*[a-z0-9])?(/[^/]+)+/?$') && "
        "!self.source.matches('/[.][.]?(/|$)'))",
        "a pvc:// source names a claim and a path on it; write pvc://claim/path, without '..'",
        ".source",
    )
    for path in _CLAIM_SOURCES
)

RULES = (NAME_RULE, *FROZEN_RULES, STAGES_RULE, *SPEC_RULES, *CLAIM_RULES)
