"""The plan of a run as it is kept: made once, so that a newer operator does not reshape a run that
has begun."""

from collections.abc import Mapping
from dataclasses import dataclass

from pydantic import ValidationError

from stagetune_api import names
from stagetune_api.artifact import digest_of_json
from stagetune_api.facts import Facts
from stagetune_api.spec import StagedFineTuneSpec
from stagetune_operator.plan import Plan

_SPEC_DIGEST = "spec-digest"
_DECIDING = {"model", "dataset", "method", "schedule", "stages", "training", "protection"}
_DIGEST_LENGTH = 10


class DamagedPlanError(Exception):
    """The ConfigMap of a plan does not hold one."""


@dataclass(frozen=True, kw_only=True)
class PlanRecord:
    """A plan, the facts it was made from, and the digest of the spec it was made for."""

    plan: Plan
    facts: Facts
    spec_digest: str

    def data(self) -> dict[str, str]:
        """Return the record as a ConfigMap's data."""
        return {
            names.PLAN_FILE: self.plan.model_dump_json(indent=2),
            names.FACTS_FILE: self.facts.model_dump_json(indent=2),
            _SPEC_DIGEST: self.spec_digest,
        }


def read_plan_record(data: Mapping[str, str]) -> PlanRecord:
    """Return the record in a ConfigMap's data; raise DamagedPlanError where it holds none."""
    try:
        return PlanRecord(
            plan=Plan.model_validate_json(data[names.PLAN_FILE]),
            facts=Facts.model_validate_json(data[names.FACTS_FILE]),
            spec_digest=data[_SPEC_DIGEST],
        )
    except (KeyError, ValidationError) as error:
        raise DamagedPlanError(str(error)) from error


def plan_record_name(run: str, plan_digest: str) -> str:
    """Return the name of the ConfigMap that keeps the plan with `plan_digest`."""
    return f"{run}-plan-{plan_digest[:_DIGEST_LENGTH]}"


def digest_of_planned(spec: StagedFineTuneSpec) -> str:
    """Return the digest of the part of `spec` that a plan is made from.

    Defaults are left out, so that a field which a newer version adds is not an edit; so is a number
    of passes that would be the same if it were left out.
    """
    if spec.schedule is not None:
        spec = spec.model_copy(update={"schedule": spec.schedule.without_implied()})
    decided = spec.model_dump(
        mode="json",
        include=_DECIDING,
        # A cache changes no result, and its default was another once.
        exclude={"model": {"secret_name"}, "training": {"prefix_cache"}},
        exclude_defaults=True,
    )
    return digest_of_json(decided)
