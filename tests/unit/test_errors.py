"""What the API server answers, and what that means to the operator."""

import pytest

from stagetune_operator.errors import (
    AlreadyExistsError,
    ClusterError,
    ConflictError,
    DeniedError,
    GoneError,
    UnavailableError,
    error_of,
)


@pytest.mark.parametrize(
    ("status", "reason", "expected"),
    [
        (400, "BadRequest", DeniedError),
        (401, "Unauthorized", UnavailableError),
        (403, "Forbidden", DeniedError),
        (404, "NotFound", GoneError),
        (409, "AlreadyExists", AlreadyExistsError),
        (409, "Conflict", ConflictError),
        (410, "Expired", UnavailableError),
        (422, "Invalid", DeniedError),
        (429, "TooManyRequests", UnavailableError),
        (500, "InternalError", UnavailableError),
        (503, "ServiceUnavailable", UnavailableError),
        (504, "Timeout", UnavailableError),
    ],
)
def test_every_answer_has_one_meaning(
    status: int, reason: str, expected: type[ClusterError]
) -> None:
    error = error_of("GET /x", status, {"reason": reason, "message": "in its own words"}, None)
    assert type(error) is expected
    assert str(error) == "in its own words"


def test_the_wait_that_is_asked_for_is_kept_and_a_date_is_none() -> None:
    asked = error_of("GET /x", 429, {}, "7")
    assert isinstance(asked, UnavailableError)
    assert asked.retry_after == 7.0
    dated = error_of("GET /x", 503, {}, "Tue, 24 Nov 2026 15:00:00 GMT")
    assert isinstance(dated, UnavailableError)
    assert dated.retry_after is None


def test_an_answer_without_words_is_named_by_its_request() -> None:
    assert str(error_of("POST /apis/batch/v1/jobs", 502, {}, None)) == (
        "POST /apis/batch/v1/jobs: HTTP 502"
    )
