"""Load a config: TOML, then overrides, then a checked `RunConfig` or every problem at once."""

import difflib
import json
import tomllib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import reduce
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from gpt.config.rules import check_rules
from gpt.config.schema import RunConfig
from gpt.errors import ConfigError, Problem


def load_config(path: Path | str, overrides: Mapping[str, Any] | Sequence[str] = ()) -> RunConfig:
    """Read a TOML file, merge the overrides and check everything.

    `overrides`: a nested mapping, or strings `section.key=value` with a TOML value (a bare word is
    a string). Raises `ConfigError` with every problem found.
    """
    return build_config(merge_overrides(read_toml(Path(path)), overrides))


def read_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file. Raises `ConfigError` if it is missing, unreadable or not TOML."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        rule, remedy = "no such file", "give the path of a config, e.g. configs/tiny.toml"
    except OSError as error:
        rule, remedy = f"cannot be read: {error.strerror}", "give a readable TOML file"
    except UnicodeDecodeError as error:
        rule, remedy = f"is not UTF-8 at byte {error.start}", "save the file as UTF-8"
    except ValueError as error:  # TOML's own, and integers longer than Python reads
        rule, remedy = f"is not TOML: {error}", "fix this line; strings need quotes"
    except RecursionError:
        rule, remedy = "is nested too deeply", "use sections that hold plain values"
    raise ConfigError(Problem(str(path), "", rule, remedy))


def read_run_section(path: str, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return the [run] section, even of an invalid config; empty if it cannot be read."""
    with suppress(ConfigError, KeyError, TypeError, ValueError):
        return dict(merge_overrides(read_toml(Path(path)), overrides)["run"])
    return {}


def merge_overrides(
    raw: Mapping[str, Any], overrides: Mapping[str, Any] | Sequence[str]
) -> dict[str, Any]:
    """Return `raw` with the overrides merged in, key by key at any depth."""
    if not isinstance(overrides, Mapping):
        return reduce(merge_overrides, map(parse_override, overrides), dict(raw))
    result = dict(raw)
    for key, value in overrides.items():
        below = result.get(key)
        if isinstance(below, Mapping) and isinstance(value, Mapping):
            value = merge_overrides(below, value)
        result[key] = value
    return result


def parse_override(text: str) -> dict[str, Any]:
    """Parse `model.n_embd=512` to `{"model": {"n_embd": 512}}`. Raises `ConfigError`."""
    key, equals, value = text.partition("=")
    parts = [part.strip() for part in key.split(".")]
    if not equals or len(parts) < 2 or not all(parts):
        rule, remedy = "is not section.key=value", "write e.g. --set model.n_embd=576"
        raise ConfigError(Problem("--set", text, rule, remedy))
    try:
        parsed = tomllib.loads(f"value = {value}")
        leaf = parsed["value"] if len(parsed) == 1 else value
    except (ValueError, RecursionError):
        leaf = value.strip()
    *sections, name = parts
    return reduce(lambda below, section: {section: below}, reversed(sections), {name: leaf})


FIELDS = {
    name: section.annotation.model_fields
    for name, section in RunConfig.model_fields.items()
    if section.annotation
}
"""The keys of each section."""


def build_config(raw: Mapping[str, Any]) -> RunConfig:
    """Check every value and every rule between values. Raises `ConfigError` with all that fail."""
    details: list[Any] = []
    try:
        # From JSON: strict pydantic otherwise refuses a list for a tuple and a string for a path.
        config = RunConfig.model_validate_json(json.dumps(raw, default=str))
    except ValidationError as error:
        details = error.errors(include_url=False, include_context=False)
    values = _valid_values(raw, [".".join(map(str, detail["loc"][:2])) for detail in details])
    problems = [*map(_describe, details), *check_rules(values)]
    if problems:
        raise ConfigError(*problems)
    return config


def _valid_values(raw: Mapping[str, Any], invalid: Sequence[str]) -> dict[str, Any]:
    """Return given and default values by dotted key, without those whose keys are `invalid`."""
    valid = {}
    for section, fields in FIELDS.items():
        given = raw.get(section, {})
        if not isinstance(given, Mapping):
            continue
        for key, field in fields.items():
            name = f"{section}.{key}"
            if name not in invalid and (key in given or not field.is_required()):
                valid[name] = given.get(key, field.default)
    return valid


def _describe(detail: Mapping[str, Any]) -> Problem:
    """Convert one pydantic error to a `Problem`."""
    location = [str(part) for part in detail["loc"]]
    key = ".".join(location)
    if detail["type"] == "missing":
        return Problem(key, "", "is required", f"add it: {_describe_key(location)}")
    value = json.dumps(detail["input"], default=str, ensure_ascii=False)
    value = value if len(value) <= 80 else f"{value[:77]}..."
    if detail["type"] == "extra_forbidden":
        return Problem(key, value, "unknown key", _suggest_key(location))
    rule = detail["msg"][0].lower() + detail["msg"][1:]
    return Problem(key, value, rule, f"give {_describe_key(location)}")


def _describe_key(location: Sequence[str]) -> str:
    section, *rest = location
    fields = FIELDS.get(section, {})
    if fields and not (rest and rest[0] in fields):
        return f"a [{section}] table with {', '.join(fields)}"
    text = fields[rest[0]].description if fields else None
    return f"{rest[0]}: {text}" if text else "a value of the right type"


def _suggest_key(location: Sequence[str]) -> str:
    section, *rest = location
    unknown = location[-1]
    for other, fields in FIELDS.items():
        if unknown in fields:
            return f"it belongs in [{other}]: {other}.{unknown}"
    known = list(FIELDS[section] if rest else FIELDS)
    close = difflib.get_close_matches(unknown, known, n=1)
    return f"did you mean {close[0]}?" if close else f"known keys: {', '.join(known)}"
