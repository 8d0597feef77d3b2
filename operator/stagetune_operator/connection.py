"""How the operator gets to its API server: one client for its calls, sessions for its watches."""

import asyncio
import contextlib
import importlib.metadata
import logging
import os
from collections.abc import AsyncIterator, Callable
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import aiohttp
from kubernetes.aio.client import ApiClient, Configuration
from kubernetes.aio.config import (
    ConfigException,
    load_incluster_config,
    load_kube_config,
    refresh_token,
)
from pydantic_core import from_json

from stagetune_operator.views import Object

USER_AGENT = f"stagetune-operator/{importlib.metadata.version('stagetune')}"
KUBECONFIG_VARIABLE = "KUBECONFIG"
_RENEWAL_RETRY_SECONDS = 30.0
_FAREWELL_SECONDS = 0.25

logger = logging.getLogger(__name__)


class ConnectionFailedError(Exception):
    """Nothing says where the API server is."""


@contextlib.asynccontextmanager
async def connect() -> AsyncIterator[ApiClient]:
    """Yield a client for the API server, with its tokens kept fresh.

    A kubeconfig that KUBECONFIG names comes first, since a person has set it; then the pod's own
    service account; then the user's kubeconfig. Raises ConnectionFailedError if there is none.
    """
    # With it aiohttp looks for a netrc file and a proxy for each request, in two threads.
    configuration = Configuration(client_session_kwargs={"trust_env": False})
    # The lines below decide what is tried again and when.
    configuration.retries = None
    refreshing = await _configure(configuration)
    configuration.proxy = _proxy(configuration)
    client = ApiClient(configuration)
    client.user_agent = USER_AGENT
    try:
        yield client
    finally:
        if refreshing is not None:
            refreshing.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await refreshing
        await client.close()
        # A connection with TLS takes some more turns of the loop to be closed (aiohttp's
        # documentation, "Graceful Shutdown"); the sessions of the watches are closed by now.
        await asyncio.sleep(_FAREWELL_SECONDS)


async def _configure(configuration: Configuration) -> asyncio.Task[None] | None:
    """Fill in `configuration`; return the task that renews its token, if there has to be one."""
    if not os.environ.get(KUBECONFIG_VARIABLE):
        with contextlib.suppress(ConfigException):
            # The client reads the token's file again once a minute: the kubelet rotates it.
            load_incluster_config(client_configuration=configuration)
            return None
    try:
        loader = await load_kube_config(
            config_file=os.environ.get(KUBECONFIG_VARIABLE),
            client_configuration=configuration,
            persist_config=False,
        )
    except (ConfigException, OSError, TypeError) as error:
        # With no file at all the client fails on None.
        raise ConnectionFailedError(
            f"there is neither a service account nor a usable kubeconfig: {error}"
        ) from error
    return asyncio.create_task(_renew(loader, configuration), name="token renewal")


def _proxy(configuration: Configuration) -> str | None:
    """Return the proxy on the way to the server: the kubeconfig's, or else the environment's."""
    server = urlsplit(configuration.host)
    if configuration.proxy or proxy_bypass(server.hostname or ""):
        return configuration.proxy
    return getproxies().get(server.scheme)


async def _renew(loader: object, configuration: Configuration) -> None:
    """Renew the token of a kubeconfig whose program or provider hands out short-lived ones."""
    # The client only looks for them where there is a user.
    while getattr(loader, "_user", None) is not None:
        try:
            await refresh_token(loader, client_configuration=configuration)
        except (ConfigException, OSError, LookupError, ValueError) as error:
            logger.warning("the token was not renewed: %s", error)
            await asyncio.sleep(_RENEWAL_RETRY_SECONDS)
        else:
            return


def open_watch_session(
    client: ApiClient,
    *,
    on_list: Callable[[str], None],
    on_watch: Callable[[str], None],
    on_refusal: Callable[[str], None],
    take_list: Callable[[Object], Object] = lambda answer: answer,
) -> tuple[str, aiohttp.ClientSession]:
    """Return the server's address and a session for watching it with the client's credentials.

    `on_list(path)` and `on_watch(path)` are told of every list and watch that the server has begun
    to answer, `on_refusal(path)` of those that it refuses to. `take_list(answer)` gets each page
    of a list, and whoever reads the page gets what it returns.
    """

    async def authorize(
        request: aiohttp.ClientRequest, handler: aiohttp.ClientHandlerType
    ) -> aiohttp.ClientResponse:
        token = await client.configuration.get_api_key_with_prefix(
            "BearerToken", alias="authorization"
        )
        if token:
            request.headers["Authorization"] = token
        response = await handler(request)
        if response.status == 200:
            is_watch = request.url.query.get("watch") == "true"
            (on_watch if is_watch else on_list)(request.url.path)
        elif response.status in (401, 403, 404):
            on_refusal(request.url.path)
        return response

    session = aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, ssl=client.rest_client.ssl_context),
        headers={"User-Agent": USER_AGENT},
        proxy=client.configuration.proxy,
        middlewares=(authorize,),
        response_class=_taken_by(take_list),
    )
    return client.configuration.host, session


def _taken_by(take_list: Callable[[Object], Object]) -> type[aiohttp.ClientResponse]:
    """Return the class of answers that show each page of a list to `take_list` first."""

    class Response(aiohttp.ClientResponse):
        async def json(self, *, loads: Callable[[str], Any] = from_json, **options: Any) -> Any:
            # Faster than json, and keys and values that recur are kept once: of a thousand runs a
            # hundred megabytes are listed, much of which is the same words.
            answer = await super().json(loads=loads, **options)
            is_list = isinstance(answer, dict) and "items" in answer
            return take_list(answer) if is_list else answer

    return Response
