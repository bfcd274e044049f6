"""Servers of an engine in this process, as `motet serve` would start them."""

from __future__ import annotations

import asyncio
import threading
import time
from contextlib import contextmanager

from motet.runtime.serve.batch.runner import Jobs
from motet.runtime.serve.grpc.server import Server
from motet.runtime.serve.http.app import App
from motet.runtime.serve.http.server import HttpServer
from motet.runtime.serve.service import Service
from motet.runtime.trust.access import Access


class Running:
    """A server on an event loop of its own thread. `stop` may be called from the test."""

    def __init__(self, server, loop):
        self.server, self.loop = server, loop

    @property
    def service(self):
        return self.server.service

    @property
    def address(self):
        return f"127.0.0.1:{self.server.port}"

    def call(self, function, *arguments):
        """Call something on the loop and wait for it."""

        async def run():
            return function(*arguments)

        return self.start(run()).result(30)

    def start(self, work):
        return asyncio.run_coroutine_threadsafe(work, self.loop)


@contextmanager
def serving(engine, access=None, *, service=None, drain_timeout_s=1.0, prepare=None, **options):
    """`options`: of `Server`; `service`: options of `Service`; `prepare` is called with the server before it starts."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()

    async def begin():
        server = Server(Service(engine, **(service or {})), access or Access.open_to_all(), **options)
        if prepare is not None:
            prepare(server)
        await server.start()
        return server

    async def end(server):
        if server.jobs is not None:
            await server.jobs.stop()
        await server.stop(drain_timeout_s)

    try:
        running = Running(asyncio.run_coroutine_threadsafe(begin(), loop).result(30), loop)
        try:
            yield running
        finally:
            running.start(end(running.server)).result(30)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


@contextmanager
def serving_http(engine, access=None, *, tls=None, registry=None, service=None, state=None, prepare=None):
    """An HTTP door; yields (host:port, the service). `service`: options of `Service`; `state`: directory of batch jobs;
    `prepare` is called with the application before it starts."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()

    async def begin():
        made = Service(engine, **(service or {}))
        app = App(made, access or Access.open_to_all(), registry)
        if state is not None:
            app.door.jobs = Jobs(made, state, app.answer)
            app.door.jobs.start()
        if prepare is not None:
            prepare(app)
        server = HttpServer(app, tls=tls)
        await server.start()
        return server, app.door

    async def end(server, door):
        if door.jobs is not None:
            await door.jobs.stop()
        await server.stop()

    try:
        server, door = asyncio.run_coroutine_threadsafe(begin(), loop).result(30)
        try:
            yield f"127.0.0.1:{server.port}", door.service
        finally:
            asyncio.run_coroutine_threadsafe(end(server, door), loop).result(30)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def until(condition, seconds=10):
    """Wait for a condition."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def is_free(engine, service=None):
    """Whether nothing is held: no request, no block, no place."""
    stats = engine.stats()
    mine = service is None or (service._quotas.num_open == 0 and not service._of_caller)
    return engine.is_idle and stats.free_blocks == stats.num_blocks and stats.waiting == stats.running == 0 and mine
