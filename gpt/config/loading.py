"""A config file and its overrides to a checked `RunConfig`, or every problem in them at once."""

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

# --- from TOML and overrides to one dict ---------------------------------------------------------


def load_config(path: Path | str, overrides: Mapping[str, Any] | Sequence[str] = ()) -> RunConfig:
    """Read TOML, merge the overrides, check everything.

    `overrides` is a nested mapping, or strings `section.key=value` with a TOML value (a bare word
    is taken as a string). Raises `ConfigError` with every problem found.
    """
    return build_config(merge_overrides(read_toml(Path(path)), overrides))


def read_toml(path: Path) -> dict[str, Any]:
    """Raises `ConfigError` for a file that is missing, unreadable or not TOML."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        rule, remedy = "there is no such file", "give the path of a config, as configs/tiny.toml"
    except OSError as error:
        rule, remedy = f"the file cannot be read: {error.strerror}", "give a readable TOML file"
    except UnicodeDecodeError as error:
        rule, remedy = f"not UTF-8 at byte {error.start}", "save the file as UTF-8"
    except ValueError as error:  # TOML's own, and numbers of more digits than Python reads
        rule, remedy = f"not TOML: {error}", "mend that place; text values need quotes"
    except RecursionError:
        rule, remedy = "nested too deeply", "a config is sections with plain values"
    raise ConfigError(Problem(str(path), "", rule, remedy))


def merge_overrides(
    raw: Mapping[str, Any], overrides: Mapping[str, Any] | Sequence[str]
) -> dict[str, Any]:
    """`raw` with the overrides laid over it, key by key, at any depth."""
    if isinstance(overrides, Mapping):
        return _merge(raw, overrides)
    result = dict(raw)
    for override in overrides:
        result = _merge(result, parse_override(override))
    return result


def parse_override(text: str) -> dict[str, Any]:
    """`model.n_embd=512` as `{"model": {"n_embd": 512}}`."""
    key, equals, value = text.partition("=")
    parts = [part.strip() for part in key.split(".")]
    if not equals or len(parts) < 2 or not all(parts):
        raise ConfigError(
            Problem("--set", text, "an override is section.key=value", "as --set model.n_embd=576")
        )
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


# --- from the dict to a RunConfig, or to every problem in it -------------------------------------


def build_config(raw: Mapping[str, Any]) -> RunConfig:
    """Check every value and every rule between values; `ConfigError` names all that fail."""
    try:
        # JSON, because strict pydantic takes no list for a tuple and no string for a path else.
        config = RunConfig.model_validate_json(json.dumps(raw, default=str))
        problems: list[Problem] = []
        values = config.flatten()
    except ValidationError as error:
        details = error.errors(include_url=False, include_context=False)
        problems = [_problem(detail) for detail in details]
        values = _sound_values(raw, [".".join(map(str, d["loc"][:2])) for d in details])
    problems += [found for rule in RULES if (found := rule(values))]
    if problems:
        raise ConfigError(*problems)
    return config


def _sound_values(raw: Mapping[str, Any], broken: Sequence[str]) -> dict[str, Any]:
    """The values that can still be held against the rules: given or default, and not broken."""
    sound = {}
    for section_name, section_field in RunConfig.model_fields.items():
        given = raw.get(section_name, {})
        if section_name in broken and not isinstance(given, Mapping):
            continue
        section: type[Section] = section_field.annotation  # type: ignore[assignment]
        for key, field in section.model_fields.items():
            name = f"{section_name}.{key}"
            if name not in broken and (key in given or not field.is_required()):
                sound[name] = given.get(key, field.default)
    return sound


def _problem(detail: Mapping[str, Any]) -> Problem:
    """One pydantic error in our words."""
    location = [str(part) for part in detail["loc"]]
    key = ".".join(location)
    match detail["type"]:
        case "missing":
            return Problem(key, "", "is required", f"add it: {_meaning(location)}")
        case "extra_forbidden":
            return Problem(key, _shown(detail["input"]), "is no known key", _nearest(location))
    rule = detail["msg"][0].lower() + detail["msg"][1:]
    return Problem(key, _shown(detail["input"]), rule, f"give {_meaning(location)}")


def _shown(value: Any) -> str:
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "..."


def _keys(section_name: str) -> Mapping[str, Any]:
    section = RunConfig.model_fields[section_name].annotation
    return section.model_fields if section else {}


def _meaning(location: Sequence[str]) -> str:
    section, *rest = location
    if section not in RunConfig.model_fields:
        return "a value of the right type"
    if not rest or rest[0] not in _keys(section):
        return f"a [{section}] table with {', '.join(_keys(section))}"
    text = _keys(section)[rest[0]].description or "a value of the right type"
    return f"{rest[0]}: {text}"


def _nearest(location: Sequence[str]) -> str:
    section, *rest = location
    known = list(RunConfig.model_fields) if not rest else list(_keys(section))
    wanted = location[-1]
    homes = [s for s in RunConfig.model_fields if wanted in _keys(s)]
    if homes:
        return f"it belongs in [{homes[0]}]: {homes[0]}.{wanted}"
    close = difflib.get_close_matches(wanted, known, n=1)
    if close:
        return f"did you mean {close[0]}?"
    return f"known here: {', '.join(known)}"
