"""Addresses of this machine: which are its own alone, and a port that is really free."""

from __future__ import annotations

import ipaddress
import socket

from align.errors import MachineError, UsageError


def is_local(host: str) -> bool:
    """Whether a name or address is this machine's loopback."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def open_port(host: str, port: int) -> socket.socket:
    """A socket that listens, so that nobody can take the port while the models load.

    Raises UsageError for what is no address or port, MachineError for a port that cannot be had.
    """
    if not 0 <= port <= 65535:
        raise UsageError(f"--port {port}: no such port; give one from 0 (any free one) to 65535")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(512)
    except socket.gaierror:
        listener.close()
        raise UsageError(f"--host {host}: no address of this machine; give 127.0.0.1, or 0.0.0.0 for all") from None
    except OSError as error:
        listener.close()
        raise MachineError(
            f"--port {port}: cannot be opened on {host} ({error.strerror}); give another --port, or end what uses it"
        ) from None
    return listener


def host_of(address: str) -> str:
    """The host of `host:port`; an IPv6 address is in brackets there."""
    return address[1:].partition("]")[0] if address.startswith("[") else address.partition(":")[0]
