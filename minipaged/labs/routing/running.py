"""A router's process: it listens on the loopback interface and prints its address."""

import asyncio
import socket

from minipaged.labs.routing.app import RouterApp
from minipaged.labs.routing.load import Router
from minipaged.serving.run import Server
from minipaged.serving.settings import ServerArgs
from minipaged.utils.sockets import listen


def run(router: Router, urls: list[str], port: int) -> None:
    """Route requests until Ctrl-C or SIGTERM. Raises InvalidOption for an invalid URL."""
    app = RouterApp(router, urls)
    asyncio.run(_run(app, listen(ServerArgs.host, port)))


async def _run(app: RouterApp, sockets: list[socket.socket]) -> None:
    server = Server(app, ready="your router is")
    serving = asyncio.create_task(server.serve(sockets))
    stopping = asyncio.create_task(server.stopping.wait())
    await asyncio.wait([serving, stopping], return_when=asyncio.FIRST_COMPLETED)
    server.should_exit = True  # uvicorn gives open requests a few seconds to end
    await serving
