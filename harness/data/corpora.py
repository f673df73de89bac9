"""Calibration corpora: loaders that Hydra instantiates, and the documents that they give.

A loader is deterministic in its ``seed`` and gives at most ``num_sequences`` documents. To add a corpus, add a file to
``conf/calibration`` whose ``corpus._target_`` is one of these loaders or any function like them.
"""

import logging
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from harness.data.rows import Document, document_of, is_readable, readable_names, rows_of, shaped
from harness.data.sets import staged_rows
from harness.errors import WinnowError, first_line

log = logging.getLogger(__name__)


def load_documents(corpus: Any) -> list[Document]:
    """The documents of a ``corpus`` config node. Raises WinnowError, as its loader does."""
    from hydra.errors import InstantiationException
    from hydra.utils import instantiate
    from omegaconf.errors import InterpolationToMissingValueError, MissingMandatoryValue

    try:
        documents = instantiate(corpus)
        if not isinstance(documents, list) or not all(isinstance(one, Document) for one in documents):
            raise WinnowError(f"calibration.corpus._target_={corpus['_target_']}: does not give a list of Documents")
        return documents
    except InstantiationException as error:
        if isinstance(error.__cause__, WinnowError):  # Hydra wraps what its targets raise
            raise error.__cause__ from None
        raise
    except (InterpolationToMissingValueError, MissingMandatoryValue) as error:
        option = str(error.full_key).rpartition(".")[2]
        raise WinnowError(f"the calibration corpus lacks a value: set calibration.{option}") from error


def held_out(corpus: Mapping[str, Any], used: Sequence[Document], path: str | None, most: int) -> list[Document]:
    """Documents that are not among ``used``: those of the file ``path``, or without one at most ``most`` of another
    draw of ``corpus`` (by its ``seed``), evenly spaced.

    Empty where the corpus has no others. Raises WinnowError where they cannot be read.
    """
    known = {document.text for document in used}
    if path is not None:
        return [document for document in local_files(path) if document.text not in known]
    if "seed" not in corpus:
        return []
    drawn = load_documents({**corpus, "seed": int(corpus["seed"]) + 1})
    others = [document for document in drawn if document.text not in known]
    count = min(most, len(others))
    return [others[place * len(others) // count] for place in range(count)]


def local_files(
    path: str,
    num_sequences: int | None = None,
    seed: int = 0,
    text_column: str = "text",
    source: str = "local",
    source_column: str | None = None,
    template: str | None = None,
    chat: Mapping[str, str] | None = None,
    columns: Mapping[str, str] | None = None,
) -> list[Document]:
    """Documents of a file, or of every file in a folder that can be read (in the order of their paths).

    What files and rows may look like, and what ``template``, ``chat`` and ``columns`` do: ``harness.data.rows``. With
    ``num_sequences`` a random sample of that many, in file order; without, all. Raises WinnowError where nothing can
    be read.
    """
    _check_count(num_sequences)
    root = Path(path)
    if not root.exists():
        raise WinnowError(f"calibration corpus {path} does not exist")
    files = sorted(p for p in root.rglob("*") if is_readable(p)) if root.is_dir() else [root]
    if not files:
        raise WinnowError(f"no {readable_names()} file in {path}")
    documents: list[Document] = []
    for file in files:
        for where, row in rows_of(file, text_column):
            label = str(row.get(source_column, source)) if source_column else source
            documents.append(document_of(shaped(row, where, template, chat, columns), text_column, label, where))
    return _sample(documents, num_sequences, seed)


def hub_dataset(
    path: str,
    split: str,
    num_sequences: int | None = None,
    seed: int = 0,
    name: str | None = None,
    text_column: str | None = None,
    template: str | None = None,
    chat: Mapping[str, str] | None = None,
    streaming: bool = False,
    shuffle_buffer: int = 10_000,
    source: str = "",
    root: str | None = None,
    staged_as: str = "",
) -> list[Document]:
    """A random sample of a data set that ``datasets`` can load: a hub id, or a folder in the same format.

    With a ``root`` (and a name in it, ``staged_as``) only what ``winnow-data stage`` put there is read: see
    ``staged_corpus``. The text is ``template``, a ``str.format`` over the columns, or the column ``text_column``
    ("text" unless told), or else the contents of ``messages``. Chat turns, for tokenizers with a template, come from
    ``messages`` (a list, or JSON) or from ``chat``, which maps roles to columns (``{user: instruction, assistant:
    output}``). ``streaming`` reads no more than it needs and shuffles within ``shuffle_buffer`` rows, for data sets too
    large to download. Raises WinnowError where the data set or a column is missing.
    """
    _check_count(num_sequences)
    if text_column is not None and template is not None:
        raise WinnowError(f"corpus {path}: give text_column or template, not both")
    if root is not None and staged_as:
        return staged_corpus(staged_as, root, num_sequences, seed, source)
    import datasets  # here, as it takes seconds to import and most corpora are local

    try:
        rows = datasets.load_dataset(path, name, split=split, streaming=streaming)
        if streaming:
            rows = rows.shuffle(seed=seed, buffer_size=shuffle_buffer)
            rows = rows if num_sequences is None else rows.take(num_sequences)
        else:
            rows = rows.shuffle(seed=seed)
            rows = rows if num_sequences is None else rows.select(range(min(num_sequences, len(rows))))
        documents = []
        for index, row in enumerate(rows):
            where = f"{path} ({split}), row {index}"
            documents.append(document_of(shaped(row, where, template, chat), text_column or "text", source, where))
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = first_line(error)
        if staged_as:
            reason += f"; without a network: winnow-data stage --calibration {staged_as} --to DIR, then data.root=DIR"
        raise WinnowError(f"cannot load the data set {path} (split {split}): {reason}") from error
    return documents


def staged_corpus(
    name: str, root: str | None, num_sequences: int | None = None, seed: int = 0, source: str = ""
) -> list[Document]:
    """A random sample, in order, of the corpus ``name`` under the folder ``root`` that ``winnow-data stage`` filled.

    Raises WinnowError without a ``root``, and where the corpus is not in it.
    """
    _check_count(num_sequences)
    if root is None:
        stage = f"winnow-data stage --calibration {name} --to DIR"
        raise WinnowError(f"{name} is read from staged data: {stage}, then data.root=DIR")
    staged = staged_rows(name, root)
    if num_sequences is not None and num_sequences > len(staged):
        log.warning("corpus %s: %d documents wanted, %d are staged in %s", name, num_sequences, len(staged), root)
    documents = [document_of(row, "text", source or name, f"{root}/{name}, {row['id']}") for row in staged]
    return _sample(documents, num_sequences, seed)


def mixture(parts: Sequence[str], seed: int = 0, root: str | None = None) -> list[Document]:
    """Documents of several corpora, from parts ``name:number``: ``[code:1024, writing:512]``.

    Each name is another config of the group ``calibration``, of which only the corpus is used (length, packing and the
    rest are the mixture's own); its documents keep their own source. ``root`` is their ``data.root``. Raises
    WinnowError for an unknown name.
    """
    if not parts:
        raise WinnowError("the mixture has no parts: give some, as calibration.parts=[code:1024,writing:512]")
    documents: list[Document] = []
    for part in parts:
        name, _, number = str(part).rpartition(":")
        if not name or not number.isdigit() or int(number) == 0:
            raise WinnowError(f"mixture part '{part}' is not NAME:NUMBER (as in code:1024)")
        documents.extend(load_documents(calibration_config(name, int(number), seed, root).corpus))
    return documents


def calibration_config(name: str, num_sequences: int | None, seed: int, root: str | None) -> Any:
    """The node of ``calibration/NAME.yaml`` on the search path of the running Hydra application."""
    from hydra import compose
    from hydra.core.global_hydra import GlobalHydra
    from omegaconf import open_dict

    if not GlobalHydra.instance().is_initialized():
        raise WinnowError("a mixture names other calibration configs, so it needs Hydra to be running")
    loader = GlobalHydra.instance().config_loader()
    known = [option for option in loader.get_group_options("calibration") if not option.startswith("_")]
    if name not in known:
        raise WinnowError(f"unknown calibration corpus '{name}'; known: {', '.join(known)}")
    number = "null" if num_sequences is None else num_sequences
    config = compose(f"calibration/{name}", [f"calibration.num_sequences={number}", f"calibration.seed={seed}"])
    with open_dict(config):
        config.data = {"root": root}
    return config.calibration


def _check_count(num_sequences: int | None) -> None:
    if num_sequences is not None and num_sequences < 1:
        raise WinnowError(f"calibration.num_sequences must be at least 1 (or null: all), not {num_sequences}")


def _sample(documents: list[Document], count: int | None, seed: int) -> list[Document]:
    if count is None or count >= len(documents):
        return documents
    return [documents[i] for i in sorted(random.Random(seed).sample(range(len(documents)), count))]
