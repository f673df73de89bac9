"""config.json and generation_config.json of a checkpoint folder."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from harness.errors import WinnowError, first_line
from harness.families.family import positive

LENGTH_WHERE_UNSAID = 2048  # tokens: what engines take where config.json does not say


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


def model_length(config: Mapping[str, Any]) -> int:
    """The longest sequence, in tokens, by config.json: at least as long as what any engine makes of it.

    vLLM multiplies by the factor of a linear or dynamic rope, transformers does not.
    """
    text = config.get("text_config") or config
    length = int(text.get("max_position_embeddings") or LENGTH_WHERE_UNSAID)
    rope = text.get("rope_scaling") or text.get("rope_parameters") or {}
    if rope.get("rope_type", rope.get("type")) in ("linear", "dynamic"):
        return int(length * max(1.0, float(rope.get("factor") or 1)))
    return length


def config_integer(config: Mapping[str, Any], key: str) -> int:
    """A whole number of at least 1 in config.json. Raises WinnowError where it is absent or something else."""
    return positive(config, key)
