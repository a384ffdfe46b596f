"""The rendezvous of the machines of a group: the main machine's address, and this machine's own."""

import logging
import socket
import time

import psutil

from gpt.errors import ConfigError, Problem

logger = logging.getLogger(__name__)

LOOPBACK = "127.0.0.1"
RETRY_SECONDS = 2.0


def local_address(rendezvous: str) -> str:
    """Return this machine's address as the machine at `rendezvous` (host:port) sees it; without a
    rendezvous, the loopback address. Raises OSError if there is no route."""
    if not rendezvous:
        return LOOPBACK
    host, _, port = rendezvous.rpartition(":")
    family, *_, address = socket.getaddrinfo(host, int(port), type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(address)  # chooses the route and sends nothing
        return str(probe.getsockname()[0])


def find_interface(address: str) -> str:
    """Return the network interface that has `address`. Raises OSError if none has."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(each.address.partition("%")[0] == address for each in addresses):
            return name
    raise OSError(f"no network interface has the address {address}")


def wait_for_main_machine(rendezvous: str) -> None:
    """Wait until the main machine listens at `rendezvous`."""
    host, _, port = rendezvous.rpartition(":")
    has_warned = False
    while True:
        try:
            socket.create_connection((host, int(port)), timeout=RETRY_SECONDS).close()
            return
        except OSError as error:
            if not has_warned:
                logger.warning("waiting for the main machine at %s (%s)", rendezvous, error)
            has_warned = True
        time.sleep(RETRY_SECONDS)


def is_main_machine(rendezvous: str) -> bool:
    """Whether `rendezvous` names this machine. Raises `ConfigError` if the host is unknown."""
    if not rendezvous:
        return True
    host = rendezvous.rpartition(":")[0]
    try:
        main_addresses = {info[4][0] for info in socket.getaddrinfo(host, None)}
    except OSError as error:
        rule = f"the host {host} is unknown: {error}"
        remedy = "give the address of the main machine"
        raise ConfigError(Problem("hardware.rendezvous", rendezvous, rule, remedy)) from error
    own_addresses = {each.address for many in psutil.net_if_addrs().values() for each in many}
    return bool(main_addresses & own_addresses)
