"""Listening sockets, the limit of open files and loopback addresses, for servers."""

import socket
from ipaddress import ip_address

from minipaged.errors import InvalidOption

OPEN_FILES = 2**16  # each connection is one


def listen(host: str, port: int) -> list[socket.socket]:
    """Open one listening socket per address of the host; port 0: a free port of the first one.

    Raises InvalidOption.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        addresses = dict.fromkeys((family, address[:2]) for family, _, _, _, address in found)
        chosen = list(addresses) if port else list(addresses)[:1]  # a port free on one of them
        sockets = [
            socket.create_server(address, family=family, backlog=2048) for family, address in chosen
        ]
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InvalidOption(
            f"the server cannot listen on port {port} of {host} ({reason}): choose another port, "
            "or host.",
            "port",
        ) from error
    # Without this option, the second write of a response waits up to 40 ms, until the client
    # acknowledges the first. asyncio sets it only on sockets that it has created itself.
    for each in sockets:
        each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sockets


def allow_open_files() -> None:
    """Raise the soft limit of open files to the number that a busy server needs."""
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, OPEN_FILES)), hard))


def is_loopback(host: str) -> bool:
    """Whether a name or an address is this machine's loopback interface."""
    if host.lower().rstrip(".") == "localhost":
        return True
    try:
        address = ip_address(host)
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback
