"""A router's process: it listens on the loopback interface, and says where."""

from typing import Any

import uvicorn

from minipaged.labs.routing.app import RouterApp
from minipaged.labs.routing.load import Router


class _Server(uvicorn.Server):
    async def startup(self, sockets: Any = None) -> None:
        """Print the ready line as soon as the socket listens."""
        await super().startup(sockets)
        if self.started:
            host, port = self.servers[0].sockets[0].getsockname()[:2]
            print(f"your router is on http://{host}:{port}; press Ctrl-C to stop.", flush=True)


def run(router: Router, urls: list[str], port: int) -> None:
    """Route requests until Ctrl-C or SIGTERM. Raises InvalidOption for a URL that is none."""
    config = uvicorn.Config(
        RouterApp(router, urls),
        host="127.0.0.1",
        port=port,
        log_level="critical",  # a response that breaks off is no error of the router's
        lifespan="off",
        timeout_graceful_shutdown=5,
    )
    _Server(config).run()
