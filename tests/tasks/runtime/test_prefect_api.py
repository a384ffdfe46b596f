"""What counts as Prefect's API being away."""

import httpx
import pytest

from gpt.errors import CorpusError, Problem
from tasks.runtime.prefect_api import is_api_unreachable


def raised(error, cause):
    try:
        try:
            raise cause
        except Exception as behind:
            raise error from behind
    except Exception as caught:
        return caught


OURS = CorpusError(Problem("s3://bucket", "", "cannot be read", "look at the network"))


@pytest.mark.parametrize(
    ("error", "away"),
    [
        (httpx.ConnectError("refused"), True),
        (raised(RuntimeError("in the engine"), httpx.ReadTimeout("slow")), True),
        (RuntimeError("Failed to reach API at http://127.0.0.1:4200/api/"), True),
        (RuntimeError("something else"), False),
        (raised(OURS, httpx.ConnectError("refused")), False),
        (KeyError("key"), False),
    ],
)
def test_is_away(error, away):
    assert is_api_unreachable(error) is away
