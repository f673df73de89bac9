"""Which tasks of a suite have their data: found before anything is computed."""

import logging
from typing import Any

from harness.data.sets import NotStaged, is_staged

log = logging.getLogger(__name__)


def with_data(suite: dict[str, Any]) -> dict[str, Any]:
    """The suite's node, without the tasks whose data set is not staged in their ``root``.

    ``suite["missing"]`` says what becomes of those: "error" (the default) or "skip", which leaves them out with a
    warning and names them under "left_out", so that the record does. Tasks that have no data set or read from the hub
    stay. Raises NotStaged, with the names and the command, also where no task would be left that asks for anything.
    """
    missing = {
        name: node
        for name, node in suite["tasks"].items()
        if "data_set" in node and node.get("root") is not None and not is_staged(node["data_set"], node["root"])
    }
    if not missing:
        return suite
    root = next(iter(missing.values()))["root"]
    names = " ".join(dict.fromkeys(node["data_set"] for node in missing.values()))
    command = f"winnow-data stage --only {names} --to {root}"
    if suite.get("missing", "error") == "error":
        raise NotStaged(
            f"{root} lacks the data of {', '.join(missing)}: run {command}, or leave those out with suite.missing=skip"
        )
    # Those that score what others wrote have nothing to score once all of those are gone.
    empty = [
        name for name, node in suite["tasks"].items() if node.get("sources") and missing.keys() >= {*node["sources"]}
    ]
    if not suite["tasks"].keys() - missing.keys() - {*empty}:
        raise NotStaged(f"{root} has the data of no task of suite={suite['name']}: run {command}")
    log.warning(
        "suite %s: left out, since %s lacks their data: %s (%s)", suite["name"], root, ", ".join(missing), command
    )
    kept = {name: node for name, node in suite["tasks"].items() if name not in missing}
    return suite | {"tasks": kept, "left_out": sorted(missing)}
