"""config.json and generation_config.json of a checkpoint folder."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from harness.errors import WinnowError


def read_config(folder: Path) -> dict[str, Any]:
    """The config.json of a checkpoint folder. Raises WinnowError where it is missing or not JSON."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise WinnowError(f"no model at {folder}: there is no config.json")
    return _read(path)


def read_generation_config(folder: Path) -> dict[str, Any]:
    """The generation_config.json of a checkpoint folder, empty where it has none. Raises WinnowError where it is not
    JSON."""
    path = Path(folder) / "generation_config.json"
    return _read(path) if path.is_file() else {}


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise WinnowError(f"{path} is not valid JSON: {error}") from error


def config_integer(config: Mapping[str, Any], key: str) -> int:
    """A whole number of config.json. Raises WinnowError where it is absent."""
    if not isinstance(config.get(key), int):
        raise WinnowError(f"config.json does not describe a complete model: it has no {key}")
    return int(config[key])
