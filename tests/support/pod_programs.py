"""What the containers of a stand-in node do: when they end, and how."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Protocol

Object = dict[str, Any]

KILLED = 137
"""Exit code of a process that was killed: 128 and the number of SIGKILL."""


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a pod's container ended."""

    exit_code: int = 0
    message: str = ""
    """The termination message: what the program wrote for the operator."""
    reason: str | None = None
    """As a runtime gives it, such as OOMKilled; left out, Completed or Error."""
    disruption: str | None = None
    """Reason of a DisruptionTarget condition that the pod gets, such as TerminationByKubelet."""


class Program(Protocol):
    """What a pod's container does; `stop` is set when the pod is asked to leave (SIGTERM)."""

    def __call__(self, pod: Object, stop: asyncio.Event) -> Awaitable[Ended]: ...


@dataclass(frozen=True, kw_only=True)
class Runs:
    """A program that goes on for a while and ends."""

    seconds: float = 0.0
    then: Ended = Ended()
    on_stop: Ended | None = Ended(exit_code=143)
    """How it ends when it is asked to; None if it does not listen and has to be killed."""

    async def __call__(self, pod: Object, stop: asyncio.Event) -> Ended:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.seconds):
                await stop.wait()
                if self.on_stop is not None:
                    return self.on_stop
                await asyncio.Event().wait()
        return self.then


@dataclass(frozen=True, kw_only=True)
class NeverStarts:
    """A container that waits for something that does not come."""

    reason: str = "ImagePullBackOff"
    message: str = 'Back-off pulling image "registry.example/missing"'


Script = Callable[[Object], Program | NeverStarts]
"""Says for each pod what becomes of it."""
