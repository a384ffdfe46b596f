"""Stage 1, validate-config: the config is right, or nothing else starts."""

from __future__ import annotations

from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE

from gpt.config import RunConfig, load_config


@task(name="validate-config", task_run_name="validate-config", cache_policy=NO_CACHE)
def validate_config(path: str, overrides: dict[str, Any]) -> RunConfig:
    """Raises `ConfigError` with every problem found; nothing has been read or started by then."""
    return load_config(path, overrides)
