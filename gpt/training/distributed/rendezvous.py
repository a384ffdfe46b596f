"""Where the machines of a group meet, and which of them this one is."""

from __future__ import annotations

import logging
import socket
import time

import psutil

from gpt.errors import ConfigError, Problem

logger = logging.getLogger(__name__)

LOOPBACK = "127.0.0.1"
PAUSE_SECONDS = 2.0


def local_address(rendezvous: str) -> str:
    """This machine's address as the one at `rendezvous` (host:port) sees it; without one the
    loopback. Raises OSError where there is no way there."""
    if not rendezvous:
        return LOOPBACK
    host, _, port = rendezvous.rpartition(":")
    kind, *_, there = socket.getaddrinfo(host, int(port), type=socket.SOCK_DGRAM)[0]
    with socket.socket(kind, socket.SOCK_DGRAM) as probe:
        probe.connect(there)  # chooses the way and sends nothing
        return str(probe.getsockname()[0])


def find_interface(address: str) -> str:
    """The network interface that has it."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(each.address.partition("%")[0] == address for each in addresses):
            return name
    raise OSError(f"no network interface has the address {address}")


def wait_for_main_machine(rendezvous: str) -> None:
    """Until the machine there leads a run."""
    host, _, port = rendezvous.rpartition(":")
    told = False
    while True:
        try:
            socket.create_connection((host, int(port)), timeout=PAUSE_SECONDS).close()
            return
        except OSError as error:
            if not told:
                logger.warning("waiting for the run that %s leads (%s)", rendezvous, error)
            told = True
        time.sleep(PAUSE_SECONDS)


def is_main_machine(rendezvous: str) -> bool:
    """Whether this machine is the one that `rendezvous` names. Raises `ConfigError` where there is
    no such machine."""
    if not rendezvous:
        return True
    host = rendezvous.rpartition(":")[0]
    try:
        named = {info[4][0] for info in socket.getaddrinfo(host, None)}
    except OSError as error:
        rule, remedy = f"no machine has this name: {error}", "give an address of the first machine"
        raise ConfigError(Problem("hardware.rendezvous", rendezvous, rule, remedy)) from error
    mine = {each.address for many in psutil.net_if_addrs().values() for each in many}
    return bool(named & mine)
