"""A configuration against the tables of ``harness.cells.settings``, and what is made from it, before anything is read.

Keys that the tables do not name, and nodes whose ``_target_`` is somebody's own code, go through as they are. Nothing
is changed.
"""

import inspect
import pkgutil
from collections.abc import Iterator, Mapping
from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import instantiate
from pydantic import TypeAdapter, ValidationError
from typing_extensions import get_protocol_members, is_protocol

from harness.cells.settings import Settings, meaning
from harness.errors import WinnowError, first_line

# Where the project's own code lies: only what these make is checked for its settings.
_OURS = ("harness.", "methods.", "tasks.", "reports.")
_GROUPS = (
    "model", "calibration", "method", "schedule", "refit", "router", "skip", "quantize", "suite", "diagnostics",
    "backend",
)  # fmt: skip
_MISSING = "???"
_TARGET = "_target_"
_LONGEST = 60  # letters that are shown of a value
_KINDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "string": "text",
    "dict": "a node with settings",
    "list": "a list",
}
_SCHEMA = TypeAdapter(Settings)


def check_settings(plain: Mapping[str, Any]) -> None:
    """The resolved configuration against the tables above, and whether everything that it names can be made.

    Raises WinnowError, one line, that names the settings, what was given and what may be.
    """
    for name in _GROUPS:
        if not isinstance(plain.get(name), Mapping):
            raise WinnowError(f"{name}={_shown(plain.get(name))}: should be an option of the group {name}")
    try:
        _SCHEMA.validate_python(_known(plain))
    except ValidationError as error:
        raise WinnowError("; ".join(_told(one) for one in error.errors(include_url=False)[:3])) from None
    for where, node in _targets(plain):
        _check_target(where, node)


def _known(value: Any) -> Any:
    """What the tables are about: without values that are still to be given, and without what foreign code is made
    from."""
    if not isinstance(value, Mapping):
        return value
    foreign = any(isinstance(node, Mapping) and _is_foreign(node) for node in (value, value.get("corpus")))
    kept = {str(key): _known(item) for key, item in value.items() if not (isinstance(item, str) and item == _MISSING)}
    if _is_foreign(value):
        return {}
    if foreign:  # a corpus of one's own may have parts of another form
        kept.pop("parts", None)
    return kept


def _is_foreign(node: Mapping[str, Any]) -> bool:
    return _TARGET in node and not str(node[_TARGET]).startswith(_OURS)


def _told(error: Any) -> str:
    where = ".".join(str(key) for key in error["loc"])
    message = error["msg"].removeprefix("Input ")
    if error["type"] == "literal_error":
        message = f"should be {error['ctx']['expected'].replace('True', 'true').replace('False', 'false')}"
    if kind := _KINDS.get(error["type"].removesuffix("_type")):
        message = f"should be {kind}"
    told = meaning(where)
    return f"{where}={_shown(error['input'])}: {message}" + (f" ({told})" if told else "")


def _shown(value: Any) -> str:
    words = {None: "null", True: "true", False: "false"}
    text = words[value] if value is None or isinstance(value, bool) else " ".join(str(value).split())
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"


def _targets(node: Any, where: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Every node that code is named in, and its key."""
    if isinstance(node, Mapping):
        if _TARGET in node:
            yield where, node
        for key, value in node.items():
            if where or key != "hydra":
                yield from _targets(value, f"{where}.{key}".lstrip("."))
    elif isinstance(node, list):
        for place, value in enumerate(node):
            yield from _targets(value, f"{where}.{place}")


def _check_target(where: str, node: Mapping[str, Any]) -> None:
    """Raises WinnowError where the code cannot be imported, is nothing that can be called, or does not take the
    settings beside it."""
    target = node[_TARGET]
    try:
        code = pkgutil.resolve_name(str(target))
    except Exception as error:  # whatever the module raises as it is imported
        raise WinnowError(f"{where}.{_TARGET}={target}: cannot be imported ({first_line(error)})") from error
    if not callable(code) or inspect.ismodule(code):
        raise WinnowError(f"{where}.{_TARGET}={target}: is neither a class nor a function")
    if any(key in node for key in ("_args_", "_partial_")):
        return
    try:
        signature = inspect.signature(code)
    except (TypeError, ValueError):
        return  # of a builtin
    given = {str(key): value for key, value in node.items() if key not in (_TARGET, "_convert_", "_recursive_")}
    # What opens a checkpoint gets the folder and more besides when it is called.
    bind = signature.bind_partial if where.endswith("open") else signature.bind
    try:
        bind(**given)
    except TypeError as error:
        takes = ", ".join(name for name in signature.parameters if name != "self") or "none"
        raise WinnowError(f"{where}: {target} {error}; its settings: {takes}") from error


def make(node: Any, where: str, kind: Any, **more: Any) -> Any:
    """What the node's ``_target_`` gives: it must be of the class ``kind``, or have all that this protocol names.

    Raises WinnowError, also for settings that the code does not take.
    """
    target = node.get(_TARGET) if hasattr(node, "get") else None
    if target is None:
        raise WinnowError(f"{where} has no {_TARGET}: it names no code that could be run")
    try:
        made = instantiate(node, **more)
    except InstantiationException as error:
        cause = error.__cause__
        if isinstance(cause, WinnowError):
            raise cause from None
        if isinstance(cause, TypeError | ValueError):
            raise WinnowError(f"{where}: {target} does not take these settings ({first_line(cause)})") from error
        raise
    name = kind.__name__
    if not is_protocol(kind):
        if not isinstance(made, kind):
            raise WinnowError(f"{where}.{_TARGET}={target}: is no {name}")
    elif lacking := sorted(member for member in get_protocol_members(kind) if not hasattr(made, member)):
        raise WinnowError(f"{where}.{_TARGET}={target}: is no {name.lower()}, for it has no {', '.join(lacking)}")
    return made
