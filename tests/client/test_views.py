"""What a finished run says of itself beside its tables."""

import pytest

from stagetune.run_report import StageSummary
from stagetune.views import padding_hint


def stages(*fractions: float | None) -> list[StageSummary]:
    return [StageSummary.model_construct(padding_fraction=fraction) for fraction in fractions]


@pytest.mark.parametrize("fractions", [(), (None,), (0.24, 0.1)])
def test_little_padding_is_not_spoken_of(fractions: tuple[float | None, ...]) -> None:
    assert padding_hint(stages(*fractions)) is None


def test_much_padding_is_named_with_what_saves_it() -> None:
    hint = padding_hint(stages(0.1, None, 0.546))
    assert hint is not None
    assert hint.startswith("55% of what a stage computed was padding")
    assert "spec.training.packing: true" in hint
