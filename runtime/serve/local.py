"""`local_server`: an engine and its gRPC server inside this process, so that every caller uses the client."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..api.config import EngineConfig
from ..engine.engine import Engine
from ..engine.interface import ServedEngine
from ..trust.access import Access
from .grpc.server import Server
from .service import Service


@contextmanager
def local_server(bundle: Path, config: EngineConfig | None = None) -> Iterator[str]:
    """Load a bundle and serve it on a free port of 127.0.0.1 until the `with` block ends; yields host:port."""
    with Engine.from_bundle(bundle, config) as engine, serve_engine(engine) as address:
        yield address


@contextmanager
def serve_engine(engine: ServedEngine) -> Iterator[str]:
    """Serve a running engine on a free port of 127.0.0.1, from a thread of its own; yields host:port."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="motet-server", daemon=True)
    thread.start()

    async def start() -> Server:
        # Its events belong to this loop.
        server = Server(Service(engine), Access.open_to_all(may_drain=True))
        await server.start()
        return server

    try:
        server = asyncio.run_coroutine_threadsafe(start(), loop).result()
        try:
            yield f"127.0.0.1:{server.port}"
        finally:
            asyncio.run_coroutine_threadsafe(server.stop(drain_timeout_s=1.0), loop).result()
            server.service.close()
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
