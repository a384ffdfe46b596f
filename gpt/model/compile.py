"""Compiled where a compiler is found, eager where not; said once, in one line."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

Function = TypeVar("Function", bound=Callable)


def compile_if_supported(function: Function, device: torch.device) -> Function:
    """`function` through torch.compile for static shapes, or itself where there is no compiler."""
    return function if find_compiler_error(device.type) else _compiled(function)


@functools.cache
def _compiled(function: Function) -> Function:
    return torch.compile(function, dynamic=False)  # type: ignore[return-value]


@functools.cache
def find_compiler_error(device_type: str) -> str | None:
    """Why torch.compile does not work for this kind of device here; None where it does.

    Found by compiling something small, forward and backward, because the tools it needs (a C++
    compiler and Python's headers for a CPU, Triton for a GPU) fail in many ways.
    """
    try:
        with torch.enable_grad():
            x = torch.ones(8, device=device_type, requires_grad=True)
            torch.compile(_probe, dynamic=False)(x).backward()
    except Exception as error:  # whatever the compiler raises, training can do without it
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        logger.warning("torch.compile does not work here, so training runs eagerly: %s", reason)
        return reason
    return None


def _probe(x: Tensor) -> Tensor:
    return (torch.tanh(x) * x).sum()
