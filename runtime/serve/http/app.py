"""`App`: who calls is asked before anything else, every route has its roles, and whatever ends a request is answered."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route, Router
from starlette.types import Message, Receive, Scope, Send

from ...api.limits import MAX_BEGUN_CALLS, MAX_CONCURRENT_CALLS, MAX_NAME_BYTES, MAX_REQUEST_BYTES
from ...api.rules import Text
from ...errors import InvalidRequestError, NotFoundError, OverloadedError, UnavailableError, UnimplementedError, shown
from ...trust.access import Access
from ...trust.identity import Identity, Role
from ..batch.runner import Jobs
from ..calls import Caller
from ..service import Service
from .statuses import MethodNotAllowedError, as_motet_error, error_body, error_response

log = logging.getLogger("motet.server")
T = TypeVar("T")

ANY = frozenset(Role)
WORK = frozenset({Role.INFER, Role.BATCH})
_USER = Text(MAX_NAME_BYTES)
MAX_UPLOADS = 4  # at once
_BODY_S = 10.0  # for a request's body to come
_OPEN_TO_ALL = "/health"  # load balancers have no keys

Handler = Callable[["Door", Request], Awaitable[Response]]


@dataclass(frozen=True, slots=True)
class HttpRoute:
    method: str
    path: str
    roles: frozenset[Role]
    handler: Handler
    query: frozenset[str] = frozenset()  # parameters that it takes


class Door:
    """What handlers work with."""

    def __init__(self, service: Service, registry: CollectorRegistry | None = None) -> None:
        self.service, self.registry = service, registry
        self.jobs: Jobs | None = None  # set when there are any: they need the application themselves
        self.uploads: Counter[str] = Counter()  # by tenant, at once: each is on the disk before it is kept
        self._begun: Counter[str] = Counter()  # host → its requests whose body has not come

    @staticmethod
    def caller(request: Request, end_user: str | None = None) -> Caller:
        """Who calls, and for whom, if the body says so. Raises `InvalidRequestError`."""
        caller: Caller = request.scope["motet.caller"]
        if end_user is None:
            return caller
        return dataclasses.replace(caller, end_user=_USER.check("user", end_user))

    async def body(
        self, request: Request, kind: type[T], method: str, media_size: Callable[[T], int] | None = None
    ) -> T:
        """The request's JSON, as `kind`; `method`: of the call, for the record of one that is refused. `media_size`:
        characters of its media, for which there is room of their own; None: it has none. Raises `InvalidRequestError` for what
        is too large or too late, no JSON, or has an unknown field or a wrong type."""
        media = self.service.most_media_bytes if media_size is not None else 0
        content = await self.content(request, MAX_REQUEST_BYTES + (media + 2) // 3 * 4)  # base64
        caller = self.caller(request)

        def read() -> T:
            found = decoded(content, kind)
            if media_size is not None and len(content) - media_size(found) > MAX_REQUEST_BYTES:
                raise _too_large(MAX_REQUEST_BYTES, " beside its media")
            return found

        return await self.service.read(method, read, caller)

    async def content(self, request: Request, limit: int = MAX_REQUEST_BYTES) -> bytes:
        host = request.client.host if request.client is not None else ""
        if self._begun[host] >= MAX_BEGUN_CALLS:
            raise OverloadedError(
                f"{MAX_BEGUN_CALLS} requests of this host are waiting for their bodies; send those first"
            )
        self._begun[host] += 1
        try:
            return await asyncio.wait_for(_read(request, limit), _BODY_S)
        except TimeoutError:
            raise InvalidRequestError(f"the body did not come within {_BODY_S:g} seconds") from None
        finally:
            self._begun[host] -= 1
            if not self._begun[host]:
                del self._begun[host]


async def _read(request: Request, limit: int) -> bytes:
    announced = request.headers.get("content-length", "0")
    found = bytearray()
    if not announced.isascii() or not announced.isdigit() or int(announced[:12]) > limit:
        raise _too_large(limit)
    async for piece in request.stream():
        found += piece
        if len(found) > limit:
            raise _too_large(limit)
    return bytes(found)


def _too_large(limit: int, what: str = "") -> InvalidRequestError:
    return InvalidRequestError(f"a request's body has at most {limit} bytes{what}; send less")


def decoded(content: bytes, kind: type[T]) -> T:
    """JSON as `kind`. Raises `InvalidRequestError`, naming the field."""
    try:
        return msgspec.json.decode(content, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        text, _, place = str(error).partition(" - at `")
        field = place.strip("`").removeprefix("$.")
        if text.startswith("Object contains unknown field"):
            field = ".".join(filter(None, (field.removeprefix("$"), text.split("`")[1])))
            text = f"the field {field} is unknown here, and nothing that is sent is ignored; leave it out"
        elif field:
            text = f"{field}: {text[:1].lower()}{text[1:]}"
        raise InvalidRequestError(text, field=field) from None


class App:
    """The ASGI application. Every route but `/health` asks who calls, also one that does not exist."""

    def __init__(self, service: Service, access: Access, registry: CollectorRegistry | None = None) -> None:
        from .routes import ROUTES  # which imports this module

        self._service, self._access = service, access
        self.door = Door(service, registry)
        self._num_open = 0
        self.routes: Mapping[tuple[str, str], HttpRoute] = {(route.method, route.path): route for route in ROUTES}
        self._router = Router(
            [_Route(r.path, self._endpoint(r), r.method, _allowed(ROUTES, r.path)) for r in ROUTES],
            redirect_slashes=False,
            default=_no_route,
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        assert scope["type"] == "http"
        self._num_open += 1
        try:
            await self._answer(scope, receive, send)
        finally:
            self._num_open -= 1

    async def answer(self, path: str, body: bytes, caller: Caller) -> tuple[int, bytes]:
        """(status, JSON) of a POST that comes from this process, for a caller who is known."""
        scope: dict[str, Any] = {
            "type": "http",
            "method": "POST",
            "path": path,
            "raw_path": path.encode(),
            "root_path": "",
            "query_string": b"",
            "headers": [],
            "motet.caller": caller,
        }
        messages: list[Message] = [{"type": "http.request", "body": body}]
        sent: list[Message] = []

        async def receive() -> Message:
            if messages:
                return messages.pop()
            return await asyncio.get_running_loop().create_future()  # type: ignore[no-any-return]  # nobody goes away

        async def send(message: Message) -> None:
            sent.append(message)

        await self._answer(scope, receive, send)
        if not sent:  # it was cut before its first byte
            return 503, msgspec.json.encode(error_body(UnavailableError("the answer was cut; send the request again")))
        content = b"".join(message.get("body", b"") for message in sent[1:])
        return sent[0]["status"], content

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False

        async def noting(message: Message) -> None:
            nonlocal started
            started = True
            async with asyncio.timeout(self._service.send_timeout_s):
                await send(message)

        identity: Identity | None = None
        what = f"{scope['method']} {scope['path']}"
        try:
            if self._num_open > MAX_CONCURRENT_CALLS:
                raise OverloadedError(f"{MAX_CONCURRENT_CALLS} requests are open; send fewer at once")
            if scope["path"] != _OPEN_TO_ALL and "motet.caller" not in scope:
                identity = self._access.identify(_values(scope, b"authorization"))
                traceparent = next(iter(_values(scope, b"traceparent")), "")
                scope["motet.caller"] = Caller(identity, traceparent, _peer(scope))
            elif "motet.caller" in scope:  # a job's record: its key may have been revoked since
                identity = scope["motet.caller"].identity
                self._access.check(identity)
            await self._router(scope, receive, noting)
        except (ClientDisconnect, TimeoutError):  # it went away, or does not read: nobody is there to be told
            log.info("%s: the client went away", what)
            _break(scope)
        except Exception as error:
            if "motet.admitted" not in scope:
                self._service.calls.refused(what, _peer(scope), error, identity)
            if started:  # its answer is cut: the client sees that it is not whole
                log.error("%s failed in its answer", what, exc_info=error)
                _break(scope)
            else:
                try:
                    await error_response(as_motet_error(error, what))(scope, receive, noting)
                except TimeoutError:
                    _break(scope)

    def _endpoint(self, route: HttpRoute) -> Callable[[Request], Awaitable[Response]]:
        async def answer(request: Request) -> Response:
            if route.path != _OPEN_TO_ALL:
                Door.caller(request).identity.require(self.routes[route.method, route.path].roles)
            request.scope["motet.admitted"] = True
            unknown = sorted(set(request.query_params) - route.query)
            if unknown:
                raise InvalidRequestError(
                    f"the parameter {shown(unknown[0])} is unknown here, and nothing that is sent is ignored; leave it out",
                    field=unknown[0][:100],
                )
            return await route.handler(self.door, request)

        return answer


def _allowed(routes: Iterable[HttpRoute], path: str) -> list[str]:
    """The methods of a path. Starlette answers HEAD where there is GET."""
    methods = {route.method for route in routes if route.path == path}
    return sorted(methods | ({"HEAD"} if "GET" in methods else set()))


class _Route(Route):
    def __init__(self, path: str, endpoint: Any, method: str, allowed: list[str]) -> None:
        super().__init__(path, endpoint, methods=[method])
        self._allowed = allowed

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Starlette's own refusal of a method is plain text."""
        if scope["method"] not in (self.methods or ()):
            raise MethodNotAllowedError(scope["method"], self.path, self._allowed)
        await super().handle(scope, receive, send)


class Work(Response):
    """An answer that takes time: `run` gets ASGI's `send`, and is cancelled when the client goes away."""

    def __init__(self, run: Callable[[Send], Awaitable[None]]) -> None:
        self._run_work = run

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def gone() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass

        work = asyncio.ensure_future(self._run_work(send))
        leaving = asyncio.create_task(gone())
        try:
            await asyncio.wait({work, leaving}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            leaving.cancel()
            if not work.done():
                work.cancel()
            await asyncio.wait({work})
        if work.cancelled():  # the client went away, or did not read
            _break(scope)
        elif (error := work.exception()) is not None:
            raise error


async def send_whole(send: Send, body: bytes) -> None:
    """Send an answer at once."""
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _break(scope: Scope) -> None:
    """End the connection at once: closing would wait until the client has read."""
    if "motet.break" in scope.get("extensions", {}):
        scope["extensions"]["motet.break"]["abort"]()


def _values(scope: Scope, name: bytes) -> list[str]:
    return [value.decode("latin-1") for key, value in scope["headers"] if key == name]


def _peer(scope: Scope) -> str:
    client: Any = scope.get("client")
    return f"{client[0]}:{client[1]}" if client else ""


async def _no_route(scope: Scope, _receive: Receive, _send: Send) -> None:
    raise NotFoundError(f"there is no {scope['method']} {scope['path'][:100]} here")


# ---- what needs no module of its own ---------------------------------------------------------------------------------


async def health(door: Door, _request: Request) -> Response:
    """200 while requests are taken."""
    is_ready = door.service.failure is None and not door.service.is_leaving
    return JSONResponse({"status": "ok" if is_ready else "unavailable"}, 200 if is_ready else 503)


async def metrics(door: Door, _request: Request) -> Response:
    if door.registry is None:
        raise UnimplementedError("this server has no metrics")
    return Response(generate_latest(door.registry), media_type=CONTENT_TYPE_LATEST)
