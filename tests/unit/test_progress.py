"""The progress endpoint: a pod speaks for its own task and for nothing else, and not too often."""

import asyncio
import base64
import json
import logging
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from aiohttp import ClientResponse
from aiohttp.test_utils import TestClient, TestServer

from stagetune_api import names
from stagetune_operator.errors import UnavailableError
from stagetune_operator.keys import RunKey, TokenIdentity
from stagetune_operator.progress import InvalidProgressError, ProgressStore, parse_progress
from stagetune_operator.progress_server import ProgressEndpoint, RateLimit
from stagetune_operator.store import Store
from stagetune_operator.token_reviews import TokenReviews

KEY = RunKey("team", "finance")
TASK = "01-layers-0-7"
EXPIRY = 10_000.0
"""When the tokens expire, on the wall clock that starts at 1,000."""


def token_of(name: str, expiry: float = EXPIRY) -> str:
    """Return what looks like a service-account token."""
    claims = base64.urlsafe_b64encode(json.dumps({"exp": expiry, "sub": name}).encode())
    return f"e30.{claims.decode().rstrip('=')}.signature-{name}"


class Desk:
    """The endpoint on loopback, with a reviewer of tokens and clocks that the test sets."""

    client: "TestClient[Any, Any]"

    def __init__(self) -> None:
        self.store = Store()
        self.told: list[RunKey] = []
        self.results: list[str] = []
        self.stage_files: dict[tuple[RunKey, str], str] = {}
        self.reviewed: list[str] = []
        self.identities: dict[str, TokenIdentity] = {}
        self.error: Exception | None = None
        self.gate: asyncio.Event | None = None
        self.now = 0.0
        self.progress = ProgressStore(self.told.append, clock=lambda: self.now)
        self.endpoint = ProgressEndpoint(
            reviews=TokenReviews(
                self.review,
                names.PROGRESS_AUDIENCE,
                clock=lambda: self.now,
                wall_clock=lambda: 1000 + self.now,
            ),
            objects=self.store,
            progress=self.progress,
            rate_limit=RateLimit(clock=lambda: self.now),
            on_post=self.results.append,
            stage_file_for=lambda key, uid: self.stage_files.get((key, uid)),
        )

    async def review(self, token: str, audience: str) -> TokenIdentity | None:
        assert audience == names.PROGRESS_AUDIENCE
        self.reviewed.append(token)
        if self.gate is not None:
            await self.gate.wait()
        if self.error is not None:
            raise self.error
        return self.identities.get(token)

    def add_run(self, name: str = "finance", namespace: str = "team") -> None:
        metadata = {
            "namespace": namespace,
            "name": name,
            "uid": f"uid-of-{namespace}-{name}",
            "creationTimestamp": "2026-01-01T00:00:00Z",
        }
        self.store.apply_run("ADDED", {"metadata": metadata, "spec": {}})

    def add_pod(
        self,
        name: str = "pod-1",
        *,
        run: str = "finance",
        task: str = TASK,
        namespace: str = "team",
        phase: str = "Running",
        event: str = "ADDED",
    ) -> None:
        metadata = {
            "namespace": namespace,
            "name": name,
            "uid": f"uid-of-{name}",
            "labels": {names.LABEL_RUN: run, names.LABEL_TASK: task},
        }
        body = {"metadata": metadata, "spec": {"containers": []}, "status": {"phase": phase}}
        self.store.apply_pod(event, body)

    def issue(self, pod: str = "pod-1", *, namespace: str = "team", **claims: Any) -> str:
        token = token_of(pod, **claims)
        self.identities[token] = TokenIdentity(
            username=f"system:serviceaccount:{namespace}:default",
            namespace=namespace,
            service_account="default",
            pod_name=pod,
            pod_uid=f"uid-of-{pod}",
        )
        return token

    async def post(
        self,
        token: str | None,
        body: Any = None,
        *,
        namespace: str = "team",
        run: str = "finance",
        task: str = TASK,
        **options: Any,
    ) -> ClientResponse:
        path = f"/apis/{names.API_VERSION}/namespaces/{namespace}/runs/{run}/tasks/{task}/progress"
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        if "data" not in options:
            options["json"] = status(loss="2.5") if body is None else body
        response: ClientResponse = await self.client.post(path, headers=headers, **options)
        return response

    async def ask(self, token: str | None, *, run: str = "finance", task: str = TASK) -> Any:
        """Ask for the stage file and return the status and the text of the answer."""
        path = f"/apis/{names.API_VERSION}/namespaces/team/runs/{run}/tasks/{task}/stage"
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        response = await self.client.get(path, headers=headers)
        return response.status, await response.text()


def status(*, percentage: Any = 10, eta: Any = 90, **metrics: Any) -> dict[str, Any]:
    return {
        "trainerStatus": {
            "progressPercentage": percentage,
            "estimatedRemainingSeconds": eta,
            "metrics": [{"name": name, "value": value} for name, value in metrics.items()],
            "lastUpdatedTime": "2026-01-01T00:00:00.123456+00:00",
        }
    }


def at_the_desk(visit: Callable[[Desk], Awaitable[None]]) -> None:
    """Have `visit` post to an endpoint with one run and one live pod of it."""

    async def main() -> None:
        desk = Desk()
        async with TestClient(TestServer(desk.endpoint.application())) as client:
            desk.client = client
            desk.add_run()
            desk.add_pod()
            await visit(desk)

    asyncio.run(main())


def test_a_pod_is_given_its_own_stage_file_and_no_other() -> None:
    async def visit(desk: Desk) -> None:
        desk.add_pod("pod-2", task="02-layers-8-15")
        desk.stage_files[KEY, "uid-of-pod-2"] = '{"task": "Train"}'
        first, second = desk.issue("pod-1"), desk.issue("pod-2")
        assert await desk.ask(second, task="02-layers-8-15") == (200, '{"task": "Train"}')
        assert await desk.ask(first) == (204, "")
        for token, task in ((first, "02-layers-8-15"), (second, TASK)):
            answer, text = await desk.ask(token, task=task)
            assert answer == 403
            assert "Train" not in text
        assert (await desk.ask(None))[0] == 401
        assert (await desk.ask(second, run="other"))[0] == 403
        assert (await desk.ask(second, task="A"))[0] == 404
        # Posts alone are counted.
        assert desk.results == []

    at_the_desk(visit)


def test_a_post_is_kept_and_the_run_is_looked_at() -> None:
    async def visit(desk: Desk) -> None:
        desk.now = 7.0
        response = await desk.post(
            desk.issue(),
            status(
                step="12",
                total_steps="120",
                loss="2.5",
                validation_loss="2.25",
                general_loss="3.5",
                kl_to_base="0.125",
                learning_rate="5e-05",
                grad_norm="0.5",
                tokens="4096",
                tokens_per_second="1024.5",
                peak_memory_bytes="8000000000",
                checkpoint_step="10",
            ),
        )
        # The Hugging Face Trainer takes nothing but a 200 for success.
        assert response.status == 200
        assert desk.told == [KEY]
        latest = desk.progress.latest(KEY, TASK)
        assert latest is not None
        assert vars(latest) == {
            "pod_uid": "uid-of-pod-1",
            "received": 7.0,
            "time": "2026-01-01T00:00:00.123456+00:00",
            "percentage": 10,
            "eta_seconds": 90,
            "step": 12,
            "total_steps": 120,
            "loss": 2.5,
            "validation_loss": 2.25,
            "general_loss": 3.5,
            "kl_to_base": 0.125,
            "learning_rate": 5e-05,
            "grad_norm": 0.5,
            "tokens": 4096,
            "tokens_per_second": 1024.5,
            "peak_memory_bytes": 8000000000,
            "checkpoint_step": 10,
        }
        assert desk.progress.of(KEY) == {TASK: latest}
        desk.progress.forget(KEY)
        assert desk.progress.latest(KEY, TASK) is None

    at_the_desk(visit)


def test_a_post_that_leaves_something_out_does_not_unsay_it_but_another_pod_begins_anew() -> None:
    async def visit(desk: Desk) -> None:
        first = desk.issue("pod-1")
        await desk.post(first, status(step="5", loss="2.5"))
        await desk.post(first, status(step="6"))
        latest = desk.progress.latest(KEY, TASK)
        assert latest is not None
        assert (latest.step, latest.loss) == (6, 2.5)

        desk.add_pod("pod-2")
        await desk.post(desk.issue("pod-2"), status(step="5"))
        latest = desk.progress.latest(KEY, TASK)
        assert latest is not None
        assert (latest.pod_uid, latest.step, latest.loss) == ("uid-of-pod-2", 5, None)

    at_the_desk(visit)


@pytest.mark.parametrize("token", [None, "", "made-up", "x" * 8100, "señal"])
def test_without_a_good_token_it_is_401(token: str | None) -> None:
    async def visit(desk: Desk) -> None:
        response = await desk.post(token)
        assert response.status == 401
        assert (await response.json())["status"] == "Failure"
        assert desk.progress.of(KEY) == {}

    at_the_desk(visit)


def test_a_token_in_another_scheme_is_none() -> None:
    async def visit(desk: Desk) -> None:
        path = f"/apis/{names.API_VERSION}/namespaces/team/runs/finance/tasks/{TASK}/progress"
        headers = {"Authorization": f"Basic {desk.issue()}"}
        response = await desk.client.post(path, json=status(), headers=headers)
        assert response.status == 401
        assert desk.reviewed == []

    at_the_desk(visit)


@pytest.mark.parametrize(
    "elsewhere",
    [{"namespace": "other"}, {"run": "other"}, {"task": "02-layers-8-15"}, {"task": "export"}],
)
def test_a_pod_cannot_speak_for_another_task_run_or_namespace(elsewhere: dict[str, str]) -> None:
    async def visit(desk: Desk) -> None:
        desk.add_run("other")
        desk.add_run("finance", "other")
        response = await desk.post(desk.issue(), **elsewhere)
        assert response.status == 403
        assert desk.told == []

    at_the_desk(visit)


def test_only_a_pod_that_lives_can_speak() -> None:
    async def visit(desk: Desk) -> None:
        token = desk.issue()
        for phase, expected in (("Running", 200), ("Succeeded", 403), ("Failed", 403)):
            desk.add_pod(phase=phase)
            assert (await desk.post(token)).status == expected
        desk.add_pod()
        assert (await desk.post(token)).status == 200
        desk.add_pod(event="DELETED")
        # The review is still remembered; the pod is not.
        assert (await desk.post(token)).status == 403
        assert len(desk.reviewed) == 1

    at_the_desk(visit)


def test_a_token_that_is_bound_to_no_pod_or_to_one_of_this_name_before_is_refused() -> None:
    async def visit(desk: Desk) -> None:
        unbound, before = token_of("unbound"), token_of("before")
        account = ("system:serviceaccount:team:default", "team", "default")
        desk.identities[unbound] = TokenIdentity(*account, pod_name="", pod_uid="")
        desk.identities[before] = TokenIdentity(*account, pod_name="pod-1", pod_uid="uid-before")
        assert (await desk.post(unbound)).status == 403
        assert (await desk.post(before)).status == 403

    at_the_desk(visit)


def test_a_run_that_is_not_there_is_404() -> None:
    async def visit(desk: Desk) -> None:
        desk.add_pod("orphan", run="gone")
        assert (await desk.post(desk.issue("orphan"), run="gone")).status == 404
        assert (await desk.post(desk.issue(), run="..%2F..")).status == 404
        assert (await desk.client.post("/apis/other")).status == 404
        assert desk.progress.of(RunKey("team", "gone")) == {}

    at_the_desk(visit)


def test_a_large_body_is_413_whether_its_size_is_said_or_not() -> None:
    async def chunks() -> Any:
        for _ in range(names.PROGRESS_MAX_BYTES // 1024 + 1):
            yield b" " * 1024

    async def visit(desk: Desk) -> None:
        large = b" " * (names.PROGRESS_MAX_BYTES + 1)
        assert (await desk.post(desk.issue(), data=large)).status == 413
        assert desk.reviewed == []
        assert (await desk.post(desk.issue(), data=chunks())).status == 413
        assert desk.results == ["413", "413"]

    at_the_desk(visit)


def test_more_than_two_posts_a_second_are_429_for_this_pod_alone() -> None:
    async def visit(desk: Desk) -> None:
        token = desk.issue()
        answers = [(await desk.post(token)).status for _ in range(6)]
        assert answers == [200, 200, 200, 200, 429, 429]
        refused = await desk.post(token)
        assert refused.headers["Retry-After"] == "1"
        desk.add_pod("pod-2")
        assert (await desk.post(desk.issue("pod-2"))).status == 200
        desk.now += 1.0
        answers = [(await desk.post(token)).status for _ in range(3)]
        assert answers == [200, 200, 429]

    at_the_desk(visit)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"{}",
        b'{"trainerStatus": 1}',
        b'{"trainerStatus": {"metrics": "loss"}}',
        b'{"trainerStatus": {"metrics": [{"value": "1"}]}}',
        b'{"trainerStatus": {"lastUpdatedTime": ["hunter2"]}}',
        b'{"trainerStatus": {"metrics": [' + b'{"name": "a"},' * 300 + b'{"name": "a"}]}}',
        b"\xff\xfe",
        b"[" * 5000,
    ],
)
def test_a_body_that_is_no_trainer_status_is_400(body: bytes) -> None:
    async def visit(desk: Desk) -> None:
        response = await desk.post(desk.issue(), data=body)
        assert response.status == 400
        assert "hunter2" not in await response.text()
        assert desk.progress.of(KEY) == {}

    at_the_desk(visit)


def test_what_is_no_number_or_not_known_is_left_out() -> None:
    body = status(
        percentage=1e300,
        eta=-5,
        loss="nan",
        learning_rate="inf",
        grad_norm="much",
        step="-3",
        total_steps="1e400",
        eval_loss="1.5",
        rewards="7",
        current_epoch="0.5",
    )
    body["trainerStatus"]["lastUpdatedTime"] = "yesterday\nforged line"
    body["other"] = {}
    progress = parse_progress(json.dumps(body).encode(), pod_uid="p", received=0)
    assert progress.loss is None
    assert progress.learning_rate is None
    assert progress.grad_norm is None
    assert progress.total_steps is None
    assert progress.step == 0
    assert progress.validation_loss == 1.5
    assert (progress.percentage, progress.eta_seconds) == (100, 0)
    assert progress.time == ""


def test_the_bodies_of_the_hugging_face_trainer_are_understood() -> None:
    first = {
        "trainerStatus": {
            "lastUpdatedTime": "2026-01-01T00:00:00+00:00",
            "progressPercentage": 0,
            "metrics": [{"name": "total_steps", "value": "120"}],
        }
    }
    later = status(loss="2.5", grad_norm="0.1", current_step="7", total_steps="120", epoch="0.1")
    begun = parse_progress(json.dumps(first).encode(), pod_uid="p", received=0)
    assert (begun.percentage, begun.total_steps, begun.eta_seconds) == (0, 120, None)
    going = parse_progress(json.dumps(later).encode(), pod_uid="p", received=0)
    assert (going.step, going.total_steps, going.loss) == (7, 120, 2.5)
    with pytest.raises(InvalidProgressError, match="trainerStatus"):
        parse_progress(b"{}", pod_uid="p", received=0)


def test_a_review_serves_a_minute_and_never_outlives_the_token() -> None:
    async def visit(desk: Desk) -> None:
        token, short = desk.issue("pod-1"), desk.issue("pod-2", expiry=1020.0)
        desk.add_pod("pod-2")
        for now, expected in ((0, 1), (59, 1), (61, 2)):
            desk.now = now
            assert (await desk.post(token)).status == 200
            assert desk.reviewed.count(token) == expected
        desk.now = 0
        for now, expected in ((5, 1), (19, 1), (21, 2)):
            desk.now = now
            assert (await desk.post(short)).status == 200
            assert desk.reviewed.count(short) == expected

    at_the_desk(visit)


def test_a_refused_token_is_not_asked_for_again_at_once() -> None:
    async def visit(desk: Desk) -> None:
        for _ in range(5):
            assert (await desk.post("made.up.token")).status == 401
        assert desk.reviewed == ["made.up.token"]
        desk.now += 6
        await desk.post("made.up.token")
        assert len(desk.reviewed) == 2

    at_the_desk(visit)


def test_requests_with_one_token_wait_for_one_review() -> None:
    async def visit(desk: Desk) -> None:
        desk.gate = asyncio.Event()
        token = desk.issue()
        posts = [asyncio.create_task(desk.post(token)) for _ in range(4)]
        while not desk.reviewed:
            await asyncio.sleep(0)
        posts[0].cancel()
        desk.gate.set()
        answers = await asyncio.gather(*posts, return_exceptions=True)
        assert [item.status for item in answers[1:] if isinstance(item, ClientResponse)] == [
            200
        ] * 3
        assert len(desk.reviewed) == 1

    at_the_desk(visit)


def test_a_flood_of_made_up_tokens_does_not_become_one_of_reviews() -> None:
    async def visit(desk: Desk) -> None:
        desk.gate = asyncio.Event()
        posts = [asyncio.create_task(desk.post(f"made.up.{number}")) for number in range(60)]
        while len(desk.results) < 28:
            await asyncio.sleep(0.001)
        desk.gate.set()
        statuses = [(await post).status for post in posts]
        assert len(desk.reviewed) == 32
        assert sorted(set(statuses)) == [401, 503]

    at_the_desk(visit)


def test_while_tokens_cannot_be_checked_it_is_503_and_not_remembered() -> None:
    async def visit(desk: Desk) -> None:
        token = desk.issue()
        desk.error = UnavailableError("etcd is away", retry_after=7)
        response = await desk.post(token)
        assert response.status == 503
        assert response.headers["Retry-After"] == "7"
        assert "etcd" not in await response.text()
        desk.error = None
        assert (await desk.post(token)).status == 200

    at_the_desk(visit)


def test_no_token_is_ever_logged(caplog: pytest.LogCaptureFixture) -> None:
    async def visit(desk: Desk) -> None:
        token = desk.issue()
        for body in (None, {"bad": "body"}):
            await desk.post(token, body)
        await desk.post(token, run="other")
        await desk.post("made.up.secret")
        desk.error = UnavailableError("away")
        await desk.post("another.made-up.secret")
        assert desk.results == ["200", "400", "403", "401", "503"]

    with caplog.at_level(logging.DEBUG):
        at_the_desk(visit)
    assert "secret" not in caplog.text
    assert "signature" not in caplog.text
