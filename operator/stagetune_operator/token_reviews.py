"""Whose a token is, asked of the API server as seldom as is safe.

A pod posts every few seconds with the same token. One review serves a minute, requests that come
while it is on its way wait for it, and what was refused is not asked again at once.
"""

import asyncio
import base64
import contextlib
import hashlib
import json
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable

from stagetune_operator.errors import UnavailableError
from stagetune_operator.keys import TokenIdentity

Review = Callable[[str, str], Awaitable[TokenIdentity | None]]
"""Returns whose token for an audience it is, None if it is none; may raise a ClusterError."""

ACCEPTED_SECONDS = 60.0
REFUSED_SECONDS = 5.0
MAX_TOKEN_LENGTH = 8000
MAX_REMEMBERED = 10000
MAX_AT_ONCE = 32
"""Reviews on their way at a time; a flood of made-up tokens must not become one of reviews."""


class TokenReviews:
    """Reviews of tokens for one audience, remembered for a while."""

    def __init__(
        self,
        review: Review,
        audience: str,
        *,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._review = review
        self._audience = audience
        self._clock = clock
        self._wall_clock = wall_clock
        self._known: OrderedDict[bytes, tuple[float, TokenIdentity | None]] = OrderedDict()
        """By the token's hash, so that no token lies in memory: until when, and whose it is."""
        self._pending: dict[bytes, asyncio.Task[TokenIdentity | None]] = {}

    async def identify(self, token: str) -> TokenIdentity | None:
        """Return whose token it is, None if it is not a good one.

        Raises ClusterError if the server cannot be asked.
        """
        if not 0 < len(token) <= MAX_TOKEN_LENGTH or not token.isascii():
            return None
        digest = hashlib.sha256(token.encode()).digest()
        until, identity = self._known.get(digest, (0.0, None))
        if self._clock() < until:
            return identity
        task = self._pending.get(digest)
        if task is None:
            if len(self._pending) >= MAX_AT_ONCE:
                raise UnavailableError("too many tokens are being reviewed", retry_after=1)
            task = asyncio.create_task(self._ask(digest, token))
            self._pending[digest] = task
            task.add_done_callback(lambda done: self._settle(digest, done))
        # A client that hangs up must not take the answer from the others.
        return await asyncio.shield(task)

    def _settle(self, digest: bytes, task: asyncio.Task[TokenIdentity | None]) -> None:
        self._pending.pop(digest, None)
        if not task.cancelled():
            # Whoever asked may have hung up; an error that nobody takes would be logged.
            task.exception()

    async def _ask(self, digest: bytes, token: str) -> TokenIdentity | None:
        identity = await self._review(token, self._audience)
        seconds = REFUSED_SECONDS
        if identity is not None:
            seconds = min(ACCEPTED_SECONDS, _expiry(token) - self._wall_clock())
        self._known[digest] = (self._clock() + seconds, identity)
        self._known.move_to_end(digest)
        if len(self._known) > MAX_REMEMBERED:
            self._known.popitem(last=False)
        return identity


def _expiry(token: str) -> float:
    """Return when a token that the server accepts expires, in seconds since 1970.

    0, so that it is reviewed each time, for one that does not say: then it is no bound token.
    """
    with contextlib.suppress(ValueError, IndexError, TypeError, KeyError):
        payload = token.split(".")[1]
        claims = json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))
        return float(claims["exp"])
    return 0.0
