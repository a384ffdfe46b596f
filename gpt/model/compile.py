"""torch.compile where a compiler is found, eager execution where it is not."""

import functools
import logging
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from gpt.errors import first_line

logger = logging.getLogger(__name__)

Function = TypeVar("Function", bound=Callable)


def compile_if_supported(function: Function, device: torch.device) -> Function:
    """Compile `function` for static shapes; return it unchanged if no compiler works here."""
    if find_compiler_error(device.type):
        return function
    return torch.compile(function, dynamic=False)  # type: ignore[return-value]


@functools.cache
def find_compiler_error(device_type: str) -> str | None:
    """Return why torch.compile fails for this type of device; None if it works.

    Compiles a small function, forward and backward, because the tools that are needed (a C++
    compiler and Python's headers on a CPU, Triton on a GPU) can fail in many ways.
    """
    try:
        with torch.enable_grad():
            x = torch.ones(8, device=device_type, requires_grad=True)
            torch.compile(_probe, dynamic=False)(x).backward()
    except Exception as error:  # training works without the compiler, whatever it raises
        reason = first_line(error)
        logger.warning("torch.compile does not work here, so training runs eagerly: %s", reason)
        return reason
    return None


def _probe(x: Tensor) -> Tensor:
    return (torch.tanh(x) * x).sum()
