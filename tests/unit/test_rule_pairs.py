"""Sound values of all that says what is trained, put together at random: rules and validator agree.

`test_rules` looks at single fields and their faults; here every value is sound by itself, so that
what is refused is refused for what stands beside it.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from stagetune_api.problems import ProblemReason
from stagetune_api.structural import Node
from stagetune_api.validation import parse_manifest

Values = st.SearchStrategy[dict[str, Any]]


def some(**choices: list[Any]) -> Values:
    """Any of the fields, each with one of its values."""
    optional = {name: st.sampled_from(values) for name, values in choices.items()}
    return st.fixed_dictionaries({}, optional=optional)


METHODS = st.one_of(
    some(type=["Full", "Expand", "LoRA"]),
    st.fixed_dictionaries(
        {
            "type": st.sampled_from(["LoRA", "QLoRA"]),
            "lora": some(rank=[4], dora=[True, False], adapters=["Shared", "PerStage"]),
        }
    ),
    st.just({"type": "Expand", "expand": {"layersPerBlock": 2}}),
)
TRAINING = st.one_of(
    some(batchSize=[4, 16], microBatchSize=[1, 4], optimizerInBackward=[True, False]),
    st.just({"optimizer": "AdamW8bit", "optimizerInBackward": True, "microBatchSize": 16}),
)
SCHEDULES = st.builds(
    lambda size, options: {**size, **options},
    st.sampled_from([{"layersPerStage": 4}, {"stageCount": 4}, {"stageCount": 64}]),
    some(
        order=["BottomUp", "TopDown", "GradientNorm"],
        gradientNorm=[{}],
        head=["Never", "LastStage"],
        embeddings=["Never", "FirstStage"],
        openTop=[0, 2],
        cumulative=[True, False],
        overlap=[0, 1, 4],
        passes=[1, 2, 4],
        dataPartition=["Shared", "Disjoint"],
        dataFraction=[0.1, 0.25, 1],
    ),
)
STAGES = st.lists(
    some(
        head=[True, False],
        embeddings=[True, False],
        learningRate=[1e-4],
        dataFraction=[0.5, 1],
        dataOffset=[0, 0.5],
        openTop=[0, 2],
        batchSize=[4, 6, 16],
        microBatchSize=[1, 2, 4, 16],
        rank=[4],
    ),
    min_size=1,
    max_size=3,
)
PROTECTION = some(
    distillation=[{"weight": 0}, {"weight": 1}],
    anchor=[{"weight": 0}, {"weight": 1}],
    replay=[{"ratio": 0.1, "generated": {}}, {"ratio": 0.1, "source": "hf://org/text"}],
    averaging=[{}, {"alpha": 0.5}],
    depthScaling=[{"bottom": 0.5}],
)
TEXTS = st.sampled_from(["hf://org/text", "hf://org/other"]).map(lambda text: {"source": text})


@st.composite
def edits(draw: st.DrawFn) -> dict[str, Any]:
    """Edits that give sections of the manifest, some of them."""
    stages = draw(st.none() | STAGES)
    rates = [{"learningRate": 1e-4}, {"learningRateByDepth": {"bottom": 1e-5, "top": 1e-4}}]
    return {
        "spec.method": draw(METHODS),
        "spec.training": {**draw(st.sampled_from(rates)), **draw(TRAINING)},
        "spec.schedule": draw(SCHEDULES) if stages is None else None,
        "spec.stages": stages
        and [
            {"name": f"s{index}", "layers": {"first": 4 * index, "last": 4 * index + 3}, **stage}
            for index, stage in enumerate(stages)
        ],
        "spec.protection": draw(st.none() | PROTECTION),
        "spec.evaluation": {"generalText": draw(TEXTS)} if draw(st.booleans()) else None,
        "spec.export": draw(some(format=["Merged", "Adapter"])),
    }


def test_rules_and_validator_agree_on_what_goes_together(
    server: Any, manifest: Callable[..., Node]
) -> None:
    seen: Counter[bool] = Counter()

    @settings(max_examples=150, deadline=None, derandomize=True, database=None)
    @given(given_edits=edits())
    def agree(given_edits: dict[str, Any]) -> None:
        document = manifest(given_edits)
        refusals, parsed = server.refusals(document), parse_manifest(document)
        problems = parsed if isinstance(parsed, list) else []
        assert not [p for p in problems if p.reason is not ProblemReason.CONFLICT], problems
        assert bool(refusals) == bool(problems), (document["spec"], refusals, problems)
        seen[bool(refusals)] += 1

    agree()

    # Neither everything nor nothing is refused.
    assert min(seen[True], seen[False]) > 20, seen
