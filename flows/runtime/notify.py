"""Telling a person, wherever they are, through Prefect's notification blocks (Slack, mail, Teams,
a webhook of one's own, ...), which keep the secrets that it takes."""

from __future__ import annotations

import inspect
from collections.abc import Sequence

from prefect.blocks.abstract import NotificationBlock
from prefect.blocks.core import Block
from prefect.utilities.asyncutils import run_coro_as_sync

from tasks.display import log_warning


def notify(blocks: Sequence[str], subject: str, body: str) -> None:
    """Send a message through each block, named as type/name. What cannot be sent is told in the
    log, and changes nothing else."""
    for name in blocks:
        try:
            block = Block.load(name)
            assert isinstance(block, NotificationBlock), "is not a block that notifies"
            with block.raise_on_failure():
                sending = block.notify(body, subject)
                if inspect.isawaitable(sending):  # as each block's author liked it
                    run_coro_as_sync(sending)
        except Exception as error:  # each service fails in ways of its own
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            log_warning(f"run.notify = {name}: could not be told how the run ended: {reason}")
