"""Load a config: TOML, then overrides, then a checked `RunConfig` or every problem at once."""

from __future__ import annotations

import difflib
import json
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from gpt.config.rules import RULES
from gpt.config.schema import RunConfig, Section
from gpt.errors import ConfigError, Problem

# --- TOML and overrides to a dict ----------------------------------------------------------------


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


def merge_overrides(
    raw: Mapping[str, Any], overrides: Mapping[str, Any] | Sequence[str]
) -> dict[str, Any]:
    """Return `raw` with the overrides merged in, key by key at any depth."""
    if isinstance(overrides, Mapping):
        return _merge(raw, overrides)
    result = dict(raw)
    for override in overrides:
        result = _merge(result, parse_override(override))
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
    nested: Any = leaf
    for part in reversed(parts):
        nested = {part: nested}
    return dict(nested)


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(base)
    for key, value in over.items():
        below = result.get(key)
        if isinstance(below, Mapping) and isinstance(value, Mapping):
            value = _merge(below, value)
        result[key] = value
    return result


# --- the dict to a RunConfig, or to its problems -------------------------------------------------


def build_config(raw: Mapping[str, Any]) -> RunConfig:
    """Check every value and every rule between values. Raises `ConfigError` with all that fail."""
    try:
        # From JSON: strict pydantic otherwise refuses a list for a tuple and a string for a path.
        config = RunConfig.model_validate_json(json.dumps(raw, default=str))
        problems: list[Problem] = []
        values = config.flatten()
    except ValidationError as error:
        details = error.errors(include_url=False, include_context=False)
        problems = [_describe(detail) for detail in details]
        values = _valid_values(raw, [".".join(map(str, d["loc"][:2])) for d in details])
    problems += [found for rule in RULES if (found := rule(values))]
    if problems:
        raise ConfigError(*problems)
    return config


def _valid_values(raw: Mapping[str, Any], invalid: Sequence[str]) -> dict[str, Any]:
    """Return given and default values by dotted key, without those whose keys are `invalid`."""
    valid = {}
    for section_name, section_field in RunConfig.model_fields.items():
        given = raw.get(section_name, {})
        if section_name in invalid and not isinstance(given, Mapping):
            continue
        section: type[Section] = section_field.annotation  # type: ignore[assignment]
        for key, field in section.model_fields.items():
            name = f"{section_name}.{key}"
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


def _keys(section_name: str) -> Mapping[str, Any]:
    section = RunConfig.model_fields[section_name].annotation
    return section.model_fields if section else {}


def _describe_key(location: Sequence[str]) -> str:
    section, *rest = location
    if section not in RunConfig.model_fields:
        return "a value of the right type"
    if not rest or rest[0] not in _keys(section):
        return f"a [{section}] table with {', '.join(_keys(section))}"
    text = _keys(section)[rest[0]].description or "a value of the right type"
    return f"{rest[0]}: {text}"


def _suggest_key(location: Sequence[str]) -> str:
    section, *rest = location
    known = list(_keys(section) if rest else RunConfig.model_fields)
    unknown = location[-1]
    for other in RunConfig.model_fields:
        if unknown in _keys(other):
            return f"it belongs in [{other}]: {other}.{unknown}"
    close = difflib.get_close_matches(unknown, known, n=1)
    return f"did you mean {close[0]}?" if close else f"known keys: {', '.join(known)}"
