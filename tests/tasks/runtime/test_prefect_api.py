"""Which errors mean that Prefect's API is unreachable."""

import httpx
import pytest

from gpt.errors import CorpusError, Problem
from tasks.runtime.prefect_api import is_api_unreachable


def chain(error, cause):
    try:
        try:
            raise cause
        except Exception as chained:
            raise error from chained
    except Exception as caught:
        return caught


CORPUS_ERROR = CorpusError(Problem("s3://bucket", "", "cannot be read", "look at the network"))


@pytest.mark.parametrize(
    ("error", "unreachable"),
    [
        (httpx.ConnectError("refused"), True),
        (chain(RuntimeError("in the engine"), httpx.ReadTimeout("slow")), True),
        (RuntimeError("Failed to reach API at http://127.0.0.1:4200/api/"), True),
        (RuntimeError("something else"), False),
        (chain(CORPUS_ERROR, httpx.ConnectError("refused")), False),
        (KeyError("key"), False),
    ],
)
def test_is_api_unreachable(error, unreachable):
    assert is_api_unreachable(error) is unreachable
