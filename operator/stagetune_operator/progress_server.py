"""The HTTP endpoint that pods post progress to, and that pods on standby ask for their stage file.

A pod speaks for its own task of its own run and for nothing else: the token has to be one that the
API server bound to that very pod, and the pod has to be one that belongs to the run. Nothing of a
request is logged, and an answer never repeats what was sent.
"""

import asyncio
import re
import time
from collections.abc import Awaitable, Callable
from http import HTTPStatus

from aiohttp import hdrs, web

from stagetune_api import names
from stagetune_operator.errors import ClusterError, UnavailableError
from stagetune_operator.keys import RunKey
from stagetune_operator.progress import InvalidProgressError, ProgressStore
from stagetune_operator.store import Store
from stagetune_operator.token_reviews import TokenReviews
from stagetune_operator.views import Object

POSTS_PER_SECOND = 2.0
QUESTIONS_PER_SECOND = 5.0
_BURST = 4.0
_MAX_BUCKETS = 10000
_BODY_SECONDS = 10.0
_LABEL = re.compile(names.DNS_LABEL_PATTERN)


class _RefusedError(Exception):
    """A request that is not taken, and the answer to it."""

    def __init__(self, status: HTTPStatus, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.retry_after = retry_after


class RateLimit:
    """A few requests at once and then so many a second, for each pod."""

    def __init__(
        self, per_second: float = POSTS_PER_SECOND, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.per_second = per_second
        self._clock = clock
        self._buckets: dict[str, tuple[float, float]] = {}
        """By the pod's uid: how many requests were left, and when."""

    def allows(self, pod_uid: str) -> bool:
        """Whether the pod may come now; counts the request if so."""
        now = self._clock()
        left, then = self._buckets.pop(pod_uid, (_BURST, now))
        left = min(_BURST, left + (now - then) * self.per_second)
        allowed = left >= 1
        # At the end again: the first one in the dict is the one that has been silent longest.
        self._buckets[pod_uid] = (left - 1 if allowed else left, now)
        if len(self._buckets) > _MAX_BUCKETS:
            del self._buckets[next(iter(self._buckets))]
        return allowed


class ProgressEndpoint:
    """Checks posts and hands them to the store of progress."""

    def __init__(
        self,
        *,
        reviews: TokenReviews,
        objects: Store,
        progress: ProgressStore,
        rate_limit: RateLimit,
        on_post: Callable[[str], None] = lambda result: None,
        stage_file_for: Callable[[RunKey, str], str | None] = lambda key, pod_uid: None,
    ) -> None:
        """`on_post(result)` is told the HTTP status of every answer to a post.

        `stage_file_for` gives the stage file of a pod by its uid, once its task is due.
        """
        self._reviews = reviews
        self._objects = objects
        self._progress = progress
        self._rate_limit = rate_limit
        self._question_limit = RateLimit(QUESTIONS_PER_SECOND)
        self._on_post = on_post
        self._stage_file_for = stage_file_for

    def application(self) -> web.Application:
        """Return the endpoint as an application, to be served by a runner or a test."""
        app = web.Application(client_max_size=names.PROGRESS_MAX_BYTES)
        path = f"/apis/{names.API_VERSION}/namespaces/{{namespace}}/runs/{{run}}/tasks/{{task}}"
        app.router.add_post(f"{path}/progress", self._take_post)
        app.router.add_get(f"{path}/stage", self._give_stage_file)
        return app

    async def _take_post(self, request: web.Request) -> web.Response:
        response = await self._answer(request, self._accept)
        self._on_post(str(response.status))
        return response

    async def _give_stage_file(self, request: web.Request) -> web.Response:
        return await self._answer(request, self._offer)

    async def _answer(
        self,
        request: web.Request,
        handle: Callable[[web.Request], Awaitable[web.Response]],
    ) -> web.Response:
        try:
            response = await handle(request)
        except _RefusedError as refused:
            response = _failure(refused.status, str(refused), refused.retry_after)
        except web.HTTPRequestEntityTooLarge:
            response = _failure(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
                f"a body has at most {names.PROGRESS_MAX_BYTES} bytes",
            )
        except ClusterError as error:
            seconds = error.retry_after if isinstance(error, UnavailableError) else None
            response = _failure(
                HTTPStatus.SERVICE_UNAVAILABLE, "tokens cannot be checked now", seconds or 5
            )
        return response

    async def _offer(self, request: web.Request) -> web.Response:
        """Return the stage file of the pod that asks; nothing while its task is not due."""
        key, task = _addressed(request)
        pod = await self._speaker(request, key, task)
        _count(pod, self._question_limit)
        text = self._stage_file_for(key, pod["metadata"]["uid"])
        if text is None:
            return web.Response(status=HTTPStatus.NO_CONTENT)
        return web.Response(text=text, content_type="application/json")

    async def _accept(self, request: web.Request) -> web.Response:
        key, task = _addressed(request)
        if (request.content_length or 0) > names.PROGRESS_MAX_BYTES:
            # Before the token costs a review.
            raise web.HTTPRequestEntityTooLarge(names.PROGRESS_MAX_BYTES)
        pod = await self._speaker(request, key, task)
        if self._objects.snapshot(key).run is None:
            raise _RefusedError(HTTPStatus.NOT_FOUND, "there is no such run")
        uid = pod["metadata"]["uid"]
        _count(pod, self._rate_limit)
        try:
            async with asyncio.timeout(_BODY_SECONDS):
                body = await request.read()
        except TimeoutError:
            raise _RefusedError(HTTPStatus.REQUEST_TIMEOUT, "the body did not come") from None
        try:
            self._progress.put(key, task, uid, body)
        except InvalidProgressError as error:
            raise _RefusedError(HTTPStatus.BAD_REQUEST, str(error)) from error
        return web.json_response({"status": "Success"})

    async def _speaker(self, request: web.Request, key: RunKey, task: str) -> Object:
        """Return the pod that posts, if it is one that may speak for this task."""
        scheme, _, token = request.headers.get(hdrs.AUTHORIZATION, "").partition(" ")
        if scheme.lower() != "bearer" or not token.strip():
            raise _RefusedError(HTTPStatus.UNAUTHORIZED, "a bearer token is needed")
        identity = await self._reviews.identify(token.strip())
        if identity is None:
            raise _RefusedError(HTTPStatus.UNAUTHORIZED, "the token is not a valid one")
        pod = self._objects.pod_by_uid(identity.pod_uid) if identity.pod_uid else None
        if (
            pod is None
            or identity.namespace != key.namespace
            or pod["metadata"]["name"] != identity.pod_name
            or not _is_live_pod_of(pod, key, task)
        ):
            raise _RefusedError(
                HTTPStatus.FORBIDDEN, "the token is not of a live pod of this task of this run"
            )
        return pod


def _count(pod: Object, limit: RateLimit) -> None:
    if not limit.allows(pod["metadata"]["uid"]):
        raise _RefusedError(
            HTTPStatus.TOO_MANY_REQUESTS, f"more than {limit.per_second:g} a second", 1
        )


def _addressed(request: web.Request) -> tuple[RunKey, str]:
    """Return the run and the task that a request's path names."""
    namespace, name, task = (request.match_info[part] for part in ("namespace", "run", "task"))
    if not all(_LABEL.fullmatch(part) for part in (namespace, name, task)):
        raise _RefusedError(HTTPStatus.NOT_FOUND, "there is no such run")
    return RunKey(namespace, name), task


def _is_live_pod_of(pod: Object, key: RunKey, task: str) -> bool:
    metadata = pod["metadata"]
    labels = metadata.get("labels") or {}
    return (
        metadata["namespace"] == key.namespace
        and labels.get(names.LABEL_RUN) == key.name
        and labels.get(names.LABEL_TASK) == task
        and (pod.get("status") or {}).get("phase") not in ("Succeeded", "Failed")
    )


def _failure(status: HTTPStatus, message: str, retry_after: float | None = None) -> web.Response:
    headers = {} if retry_after is None else {hdrs.RETRY_AFTER: f"{max(1, round(retry_after))}"}
    if status is HTTPStatus.UNAUTHORIZED:
        headers[hdrs.WWW_AUTHENTICATE] = "Bearer"
    body = {"status": "Failure", "code": status.value, "message": message}
    return web.json_response(body, status=status.value, headers=headers)
