"""config.json and generation_config.json of a checkpoint folder."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from harness.errors import WinnowError, first_line
from harness.families.family import positive


def read_config(folder: Path) -> dict[str, Any]:
    """The config.json of a checkpoint folder. Raises WinnowError where it is missing or no JSON object."""
    path = Path(folder) / "config.json"
    if not path.exists() and not path.is_symlink():
        raise WinnowError(f"no model at {folder}: there is no config.json")
    return _read(path)


def read_generation_config(folder: Path) -> dict[str, Any]:
    """The generation_config.json of a checkpoint folder, empty where it has none. Raises WinnowError where it is no
    JSON object."""
    path = Path(folder) / "generation_config.json"
    return _read(path) if path.is_file() else {}


def _read(path: Path) -> dict[str, Any]:
    again = "fetch it again"
    try:
        found = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise WinnowError(f"{path} cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise WinnowError(f"{path} is not in UTF-8 ({error.reason} at byte {error.start}): {again}") from error
    except (ValueError, RecursionError) as error:
        raise WinnowError(f"{path} is not valid JSON ({first_line(error)}): {again}") from error
    if not isinstance(found, dict):
        raise WinnowError(f"{path} holds no JSON object, but {_kind(found)}: {again}")
    return found


def _kind(value: Any) -> str:
    named = {list: "a list", str: "a text", bool: "true or false", int: "a number", float: "a number"}
    return named.get(type(value), "null")


def config_integer(config: Mapping[str, Any], key: str) -> int:
    """A whole number of at least 1 in config.json. Raises WinnowError where it is absent or something else."""
    return positive(config, key)
