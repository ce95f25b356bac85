"""Runs the server, from the first socket to the last response."""

import asyncio
import gc
import os
import socket
import sys
from types import FrameType
from typing import Any

import uvicorn
from starlette.middleware.cors import CORSMiddleware

from minipaged.errors import InvalidOption
from minipaged.llm import LLM
from minipaged.serving.api_server import build_app
from minipaged.serving.async_engine import AsyncEngine
from minipaged.serving.gate import Connection, Gate
from minipaged.serving.live_pages import LivePages
from minipaged.serving.live_view import LiveView
from minipaged.serving.metrics import Metrics
from minipaged.serving.service import Service
from minipaged.serving.settings import ServerArgs
from minipaged.tracing.events import EventLog
from minipaged.utils.sockets import allow_open_files, listen

LAST_WORDS = 2.0  # seconds in which a dead engine still answers 503 and slow clients may read


def serve(llm: LLM, args: ServerArgs, log: EventLog | None = None) -> int:
    """Serve until SIGTERM or Ctrl-C; returns the exit code: 0, or 1 if the engine has failed.

    Args:
        log: the events for the live view; the parts of the engine are `traced` with it.

    Raises InvalidOption for `viz` without a log, and for an address that cannot be used.
    """
    if args.viz and log is None:
        raise InvalidOption(
            "viz needs the EventLog that the engine is traced with: pass it as `log`.", "viz"
        )
    sockets = listen(args.host, args.port)
    allow_open_files()
    gc.collect()
    gc.freeze()  # full collections, which stop all threads, need not visit the existing objects
    gc.set_threshold(50_000, 20, 20)  # or a body of a million lists would cause 1,400 collections
    return asyncio.run(_serve(llm, args, log if args.viz else None, sockets))


async def _serve(
    llm: LLM, args: ServerArgs, log: EventLog | None, sockets: list[socket.socket]
) -> int:
    name = args.served_model_name or str(llm.args.model)
    metrics = Metrics(name, llm.engine)
    llm.engine.listeners.append(metrics.note_step)
    view = None if log is None else LiveView(llm.engine, log)
    engine = AsyncEngine(
        llm.engine,
        max_queued=args.max_queued,
        max_queued_tokens=args.max_queued_tokens,
        interval=args.stream_interval,
        observers=[metrics.note_progress, *([] if view is None else [view.note_progress])],
    )
    app: Any = Gate(build_app(Service(llm, engine, args, metrics)), args)
    if args.cors_origin is not None:
        app = CORSMiddleware(
            app, allow_origins=[args.cors_origin], allow_methods=["*"], allow_headers=["*"]
        )
    if view is not None:  # outside of CORS, so that no other website can read it
        app = LivePages(app, view, engine, name, args.key)
    server = Server(app, ready=f"minipaged serves {name}")
    serving = asyncio.create_task(server.serve(sockets))
    died = asyncio.create_task(engine.died.wait())
    stopping = asyncio.create_task(server.stopping.wait())
    await asyncio.wait([serving, died, stopping], return_when=asyncio.FIRST_COMPLETED)
    if engine.error is not None:
        await asyncio.sleep(LAST_WORDS)
    else:
        await engine.close(args.grace)
    server.should_exit = True
    await serving
    return int(engine.error is not None)


class Server(uvicorn.Server):
    """uvicorn's server, which stops only after the engine: until then it answers 503."""

    def __init__(self, app: Any, ready: str) -> None:
        config = uvicorn.Config(
            app, http=Connection, ws="none", log_level="warning", access_log=False, lifespan="off"
        )
        super().__init__(config)
        self.stopping = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Print the ready line as soon as the sockets listen."""
        await super().startup(sockets)
        assert sockets is not None
        host, port = sockets[0].getsockname()[:2]
        host = f"[{host}]" if ":" in host else host
        print(f"{self._ready} on http://{host}:{port}; press Ctrl-C to stop.", flush=True)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Close idle connections at once, and all others after LAST_WORDS seconds."""
        asyncio.get_running_loop().call_later(LAST_WORDS, self._drop_connections)
        await super().shutdown(sockets)

    def _drop_connections(self) -> None:
        for connection in list(self.server_state.connections):
            connection.transport.abort()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Shut down in order on the first signal, and at once on the second."""
        self._loop.call_soon_threadsafe(self._stop)

    def _stop(self) -> None:
        if self.stopping.is_set():
            print("minipaged: stopping at once.", file=sys.stderr, flush=True)
            os._exit(1)  # an orderly end would wait for the threads
        self.stopping.set()
