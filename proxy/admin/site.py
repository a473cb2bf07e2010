"""The HTTP server: routes, and who may use them.

Invariant: `/healthz`, `/readyz` and `/metrics` reveal no secrets, and are for everybody who reaches
the address. All else needs a password, and is served only where nobody can listen in: over TLS, or
from this machine. A page of another site can neither read an answer, since no header allows that,
nor cancel a job: that takes a POST of JSON with the page's own token, from its own origin.
Connections are few, and none may stay without making requests.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import ssl
from collections.abc import Awaitable, Callable, Iterable
from importlib.resources import files
from typing import Any, Final

from aiohttp import web

from proxy import __version__
from proxy.admin.accounts import Account, Accounts, TooManyError
from proxy.admin.jobs_page import MAX_ENDED, MAX_RUNNING
from proxy.admin.metrics import Exposition
from proxy.admin.readiness import Readiness
from proxy.admin.source import Source
from proxy.auth import rate_limit
from proxy.config import ConfigError, ListenAddress
from proxy.jobs.registry import NO_PID
from proxy.log import Event, logger
from proxy.net import tls
from proxy.runtime import Runtime

_MAX_CONNECTIONS: Final = 100

_FIRST_REQUEST: Final = 10.0
_NEXT_REQUEST: Final = 30.0
"""Seconds for a connection to make its first request, and each further one."""

_LONGEST_BODY: Final = 4096

_HEADERS: Final = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self';"
    " connect-src 'self'; img-src 'self'; base-uri 'none'; form-action 'none';"
    " frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
    "Server": "pg-background-proxy",
}

_STATIC: Final = {
    "/": ("page.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
}

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Site:
    """Serves HTTP.

    Args:
        source: provides figures and jobs.

    Raises:
        ConfigError: from the constructor, for an unusable certificate.
    """

    def __init__(self, source: Source) -> None:
        self._source = source
        self._accounts = Accounts()
        self._exposition = Exposition()
        self._readiness = Readiness(source)
        self._tls = tls.http_context(source.runtime.config)
        self._tls_of: Runtime = source.runtime
        # Connections that have made no request yet.
        self._fresh: set[web.RequestHandler] = set()
        self._servers: list[asyncio.Server] = []
        app = web.Application(middlewares=[self._guard], client_max_size=_LONGEST_BODY)
        app.on_response_prepare.append(_add_headers)
        app.router.add_get("/healthz", self._healthz)
        app.router.add_get("/readyz", self._readyz)
        app.router.add_get("/metrics", self._metrics)
        for path in _STATIC:
            app.router.add_get(path, self._file)
        app.router.add_get("/jobs", self._jobs)
        app.router.add_post("/cancel", self._cancel)
        self._runner = web.AppRunner(
            app, access_log=None, handle_signals=False, keepalive_timeout=_NEXT_REQUEST
        )

    async def serve(self, sockets: Iterable[socket.socket]) -> None:
        """Serve on bound sockets, which are closed with the servers."""
        await self._runner.setup()
        context = self._tls
        if context is not None:
            # Chosen anew for each connection, so that a reload takes effect.
            context.sni_callback = self._choose_context
        scheme = "http" if context is None else "https"
        for listening in sockets:
            name = ListenAddress(*listening.getsockname()[:2])
            server = await asyncio.get_running_loop().create_server(
                self._connection, sock=listening, ssl=context
            )
            self._servers.append(server)
            logger.info("serving metrics and the jobs page on %s://%s", scheme, name)

    async def close(self) -> None:
        for server in self._servers:
            server.close()
        self._readiness.close()
        await self._runner.cleanup()

    # Connections

    def _connection(self) -> asyncio.Protocol:
        serve = self._runner.server
        assert serve is not None
        if len(serve.connections) >= _MAX_CONNECTIONS:
            return _TurnedAway()
        protocol = serve()
        self._fresh.add(protocol)
        asyncio.get_running_loop().call_later(_FIRST_REQUEST, self._end_idle, protocol)
        return protocol

    def _end_idle(self, protocol: web.RequestHandler) -> None:
        if protocol in self._fresh:
            self._fresh.discard(protocol)
            if protocol.transport is not None:
                protocol.transport.abort()

    def _choose_context(
        self, connection: ssl.SSLObject, name: str | None, context: ssl.SSLContext
    ) -> None:
        runtime = self._source.runtime
        if runtime is not self._tls_of:
            self._tls_of = runtime
            try:
                self._tls = tls.http_context(runtime.config)
            except ConfigError as error:
                logger.error("the certificate for HTTPS stays as it was: %s", error)
        if self._tls is not None:
            connection.context = self._tls

    # For every request

    @web.middleware
    async def _guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        self._fresh.discard(request.protocol)
        if not request.secure and _is_here(request) and not _is_own_name(request.host):
            # A name from anybody's DNS may lead here, for a page of theirs to read.
            raise web.HTTPMisdirectedRequest(text="ask for 127.0.0.1, ::1 or localhost\n")
        return await handler(request)

    async def _account(self, request: web.Request) -> Account:
        """The account of a request. Raises the response for those who have none."""
        if not (request.secure or _is_here(request)):
            raise web.HTTPForbidden(
                text="passwords are taken over TLS (client_tls_sslmode) or from this machine only\n"
            )
        if not self._source.runtime.config.watchers:
            raise web.HTTPForbidden(text="nobody is in admin_users or stats_users\n")
        client_key = rate_limit.client_key(_peer(request))
        header = request.headers.get("Authorization", "")
        try:
            account = await self._accounts.log_in(header, self._source.runtime, client_key)
        except TooManyError:
            raise web.HTTPTooManyRequests(
                text="too many wrong passwords\n", headers={"Retry-After": "10"}
            ) from None
        if account is None:
            raise web.HTTPUnauthorized(
                text="a name in admin_users or stats_users, please, and its password\n",
                headers={"WWW-Authenticate": 'Basic realm="pg-background-proxy", charset="UTF-8"'},
            )
        return account

    # Routes

    async def _healthz(self, request: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    async def _readyz(self, request: web.Request) -> web.Response:
        reason = await self._readiness.reason()
        return web.Response(text=f"{reason or 'ready'}\n", status=503 if reason else 200)

    async def _metrics(self, request: web.Request) -> web.Response:
        figures, reason = await asyncio.gather(self._source.figures(), self._readiness.reason())
        body, content_type = self._exposition.write(
            figures,
            self._source.processes(),
            is_ready=not reason,
            accept=request.headers.get("Accept", ""),
        )
        return web.Response(body=body, headers={"Content-Type": content_type})

    async def _file(self, request: web.Request) -> web.Response:
        await self._account(request)
        name, content_type = _STATIC[request.path]
        content = (files(__package__) / "static" / name).read_bytes()
        return web.Response(body=content, content_type=content_type, charset="utf-8")

    async def _jobs(self, request: web.Request) -> web.Response:
        account = await self._account(request)
        _refuse_other_sites(request)
        processes = await self._source.jobs()
        running = [job for process in processes for job in process["running"]]
        waiting = [job for process in processes for job in process["waiting"]]
        ended = [job for process in processes for job in process["ended"]]
        running.sort(key=lambda job: (job["launched"], job["pid"]))
        waiting.sort(key=lambda job: job["launched"])
        ended.sort(key=lambda job: job["launched"] + job["seconds"], reverse=True)
        shown = {
            "version": __version__,
            "user": account.user,
            "token": self._accounts.token(account) if account.may_cancel else None,
            "count": sum(process["count"] for process in processes),
            "silent": self._source.processes().silent,
            "running": list(map(_without_cookie, running[:MAX_RUNNING])),
            "waiting": list(map(_without_cookie, waiting[:MAX_RUNNING])),
            "ended": list(map(_without_cookie, ended[:MAX_ENDED])),
        }
        return web.json_response(shown)

    async def _cancel(self, request: web.Request) -> web.Response:
        account = await self._account(request)
        _refuse_other_sites(request, changes=True)
        token = request.headers.get("X-CSRF-Token", "")
        if not (account.may_cancel and self._accounts.has_token(account, token)):
            raise web.HTTPForbidden(text="only admin_users may cancel, from the page\n")
        if request.content_type != "application/json":
            raise web.HTTPUnsupportedMediaType(text="JSON, please\n")
        try:
            async with asyncio.timeout(_FIRST_REQUEST):
                wanted = (await request.json())["id"]
        except (ValueError, KeyError, TypeError, TimeoutError):
            raise web.HTTPBadRequest(text='not {"id": …}\n') from None
        for process in await self._source.jobs():
            for job in (*process["running"], *process["waiting"]):
                if _id(job) == wanted:
                    told = await self._source.cancel(job["pid"] or NO_PID, job["cookie"])
                    values = {"pid": job["pid"], "user": account.user}
                    logger.info(Event("job canceled by administrator", values))
                    return web.json_response({"told": told})
        return web.json_response({"told": False})


class _TurnedAway(asyncio.Protocol):
    """A connection beyond the limit."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport.close()


async def _add_headers(request: web.Request, response: web.StreamResponse) -> None:
    response.headers.update(_HEADERS)


def _peer(request: web.Request) -> object:
    return None if request.transport is None else request.transport.get_extra_info("peername")


def _is_here(request: web.Request) -> bool:
    """Whether the client is on this machine."""
    peer = _peer(request)
    if not (isinstance(peer, tuple) and peer):
        return False
    address = ipaddress.ip_address(str(peer[0]).partition("%")[0])
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback


def _is_own_name(host: str) -> bool:
    """Whether this is an address, or the one name that means this machine everywhere."""
    name = host.rpartition(":")[0] if host.rpartition(":")[2].isdecimal() else host
    if name.lower() == "localhost":
        return True
    try:
        ipaddress.ip_address(name.removeprefix("[").removesuffix("]"))
    except ValueError:
        return False
    return True


def _refuse_other_sites(request: web.Request, *, changes: bool = False) -> None:
    """Check what a browser says about a request's origin, which others may omit unless the request
    `changes` something."""
    site = request.headers.get("Sec-Fetch-Site", "same-origin")
    origin = request.headers.get("Origin", "" if changes else None)
    own = f"{request.scheme}://{request.host}"
    if site not in ("same-origin", "none") or origin not in (None, own):
        raise web.HTTPForbidden(text="not from another site\n")


def _id(job: dict[str, Any]) -> str:
    """Identifies a job without its cookie, which would give access to it."""
    return f"{job['pid']}-{job['launched']:.6f}"


def _without_cookie(job: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in job.items() if name != "cookie"} | {"id": _id(job)}
