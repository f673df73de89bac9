"""Data-parallel calibration: every process passes over one part of the corpus, and the parts are merged.

The parts follow one another in the order of a pass, begin where a batch begins and have about as many tokens each. What
a pass over one of them measured is a shard: one file, ``<cache_dir>/<key>.shards/I-of-N.npz``, of arrays and, among
them, ``manifest``, JSON that says what they were made from. So a shard is there whole or not at all.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from harness.calibration.archive import Damaged, read_archive, read_manifest, write_archive
from harness.calibration.batches import in_order_of_pass
from harness.calibration.cache import MANIFEST_FIELDS, content_key
from harness.calibration.collected import AffineStep, Collected, Part
from harness.calibration.merge import merged_in_order
from harness.calibration.tokens import TokenSequence
from harness.claims import claimed
from harness.errors import WinnowError
from harness.files import sweep

log = logging.getLogger(__name__)

_CALLED = {"model": "model", "corpus": "calibration text", "dtype": "number format"}


@dataclass(frozen=True)
class Shards:
    """Where the shards of one corpus lie and what each must hold.

    ``key`` says what statistics are made from, as that of ``cached_statistics``. Batches of another size begin
    elsewhere, so shards of another ``batch_size`` do not fit together.
    """

    cache_dir: Path
    key: Mapping[str, Any]
    sequences: Sequence[TokenSequence]
    batch_size: int
    count: int

    @property
    def folder(self) -> Path:
        return Path(self.cache_dir) / f"{content_key(self.key)}.shards"

    def file(self, shard: int) -> Path:
        return self.folder / f"{shard}-of-{self.count}.npz"

    def computed(
        self,
        shard: int,
        needed: frozenset[str],
        compute: Callable[[frozenset[str], Sequence[TokenSequence], Part], Collected],
    ) -> Path | None:
        """The file of ``shard``, by ``compute(names, sequences, part)`` unless it is there with all ``needed``.

        Where it is there with fewer, the union is computed. A damaged one is computed anew, with a warning. None where
        the corpus has so few batches that nothing is left for this shard. Raises WinnowError where there is no such
        shard, and where the file cannot be written.
        """
        check_shard(shard, self.count)
        sequences, part = parts(self.sequences, self.batch_size, self.count)[shard]
        if not sequences:
            log.warning(
                "calibration: nothing is left for shard %d of %d: the corpus has too few batches", shard, self.count
            )
            return None
        path, name = self.file(shard), f"calibration shard {shard} of {self.count}"
        with claimed(path.with_suffix(".claim"), name):
            sweep(self.folder, f".{path.stem}.*.tmp")  # who holds the lock is alone
            there = self._statistics_of(path)
            if needed <= there:
                log.info("%s is there: %s", name, path)
                return path
            collected = compute(needed | there, sequences, part)
            _write(path, collected, self)
            log.info("%s is computed: %s", name, path)
        return path

    def _statistics_of(self, path: Path) -> frozenset[str]:
        """Of a whole shard with batches of our size; of any other none."""
        if not path.exists():
            return frozenset()
        try:
            return _read(path).names if read_manifest(path)["batch_size"] == self.batch_size else frozenset()
        except Damaged as error:
            log.warning("%s is damaged (%s): computing it anew", path, error)
            return frozenset()

    def merged(self, needed: frozenset[str]) -> Collected:
        """What one pass over the whole corpus measures, with at least ``needed``.

        Raises WinnowError, a line, where a shard is missing, damaged, of something else or without one of ``needed``.
        """
        wanted = [shard for shard, (of, _) in enumerate(parts(self.sequences, self.batch_size, self.count)) if of]
        faults = {shard: self._fault(shard, needed) for shard in wanted}
        self._refuse({shard: fault for shard, fault in faults.items() if fault})
        common = frozenset.intersection(*(frozenset(read_manifest(self.file(shard))["statistics"]) for shard in wanted))
        log.info("merging %d shards of %s", len(wanted), self.folder)
        return merged_in_order(self._whole(shard, common) for shard in wanted)

    def _whole(self, shard: int, names: frozenset[str]) -> Collected:
        try:
            return _read(self.file(shard), names)
        except Damaged as error:
            self._refuse({shard: f"damaged ({error})"})
            raise

    def _fault(self, shard: int, needed: frozenset[str]) -> str:
        """What is wrong with the shard as far as its manifest says; empty where nothing is."""
        path = self.file(shard)
        if not path.exists():
            return self._missing(path.name)
        try:
            manifest = read_manifest(path)
            lacks, size = needed - frozenset(manifest["statistics"]), manifest["batch_size"]
        except Damaged as error:
            return f"damaged ({error})"
        if size != self.batch_size:
            return f"made with calibration.batch_size={size}, not {self.batch_size}"
        return f"without {', '.join(sorted(lacks))}" if lacks else ""

    def _missing(self, name: str) -> str:
        """Says also where such a shard of something else lies beside it."""
        for path in sorted(Path(self.cache_dir).glob(f"*.shards/{name}")):
            try:
                key = read_manifest(path)["key"]
            except Damaged:
                continue
            if differs := [word for part, word in _CALLED.items() if key.get(part) != self.key.get(part)]:
                return f"missing (the one that is there is of another {' and '.join(differs)})"
        return "missing"

    def _refuse(self, faults: Mapping[int, str]) -> None:
        """Raises a WinnowError of one line where there are any."""
        if not faults:
            return
        alike = {fault: [str(shard) for shard in faults if faults[shard] == fault] for fault in faults.values()}
        told = "; ".join(
            f"shard{'s' if len(shards) > 1 else ''} {', '.join(shards)} of {self.count} {fault}"
            for fault, shards in alike.items()
        )
        each = "computes it" if len(faults) == 1 else "computes the first of them, and so on"
        raise WinnowError(f"calibration: {told}: the same command with calibration.shard={min(faults)} {each}")


def check_shard(shard: int | None, shards: int | None) -> None:
    """Raises WinnowError where there is no such shard; None stands for no shards, and for none of them."""
    if shard is None:
        return
    if shards is None:
        raise WinnowError(f"calibration.shard={shard} is one of how many? Set calibration.shards as well")
    if not 0 <= shard < shards:
        raise WinnowError(
            f"calibration.shard={shard}: with calibration.shards={shards} they count from 0 to {shards - 1}"
        )


def parts(sequences: Sequence[TokenSequence], batch_size: int, shards: int) -> list[tuple[list[TokenSequence], Part]]:
    """The corpus as ``shards`` parts, in the order of a pass; where it has fewer batches, the last have no sequence.

    A part ends with the batch whose end is nearest to its share of the tokens, and has at least one.
    """
    if batch_size < 1:
        raise WinnowError(f"calibration.batch_size must be at least 1, not {batch_size}")
    if not sequences:
        raise WinnowError("the calibration corpus is empty: it has no token sequences")
    ordered = in_order_of_pass(sequences)
    lengths = [len(sequence.input_ids) for sequence in ordered]
    starts = [*range(0, len(ordered), batch_size), len(ordered)]  # of batches, and the end
    before = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])[starts]  # tokens before each of these
    total = int(before[-1])
    batches, cuts = len(starts) - 1, [0]
    for done in range(1, shards + 1):
        nearest = int(np.abs(before - done * total / shards).argmin())
        cuts.append(min(batches, max(cuts[-1] + 1, min(nearest, batches - (shards - done)))))
    return [
        (ordered[starts[cut] : starts[end]], Part(int(before[cut]), total))
        for cut, end in zip(cuts[:-1], cuts[1:], strict=True)
    ]


# --- files ------------------------------------------------------------------------------------------------------------


def _write(path: Path, collected: Collected, of: Shards) -> None:
    arrays: dict[str, np.ndarray] = {}
    for layer, named in collected.layers.items():
        arrays |= {f"{layer}/{name}": value for name, value in named.items()}
    for layer, steps in collected.steps.items():
        for name, step in steps.items():
            arrays |= {f"{layer}/{name}/decay": step.decay, f"{layer}/{name}/from_zero": step.from_zero}
    assert collected.part is not None
    manifest = {
        **{field: getattr(collected, field) for field in MANIFEST_FIELDS},
        **asdict(collected.part),
        "key": dict(of.key),
        "batch_size": of.batch_size,
        "statistics": sorted(collected.names),
    }
    write_archive(path, manifest, arrays)


def _read(path: Path, names: frozenset[str] | None = None) -> Collected:
    """What a shard holds, of the statistics ``names`` alone where they are given. Raises Damaged."""
    manifest, arrays = read_archive(path, lambda member: names is None or member.split("/")[1] in names)
    layers: dict[int, dict[str, np.ndarray]] = {}
    steps: dict[int, dict[str, AffineStep]] = {}
    for member, value in arrays.items():
        layer, name, *half = member.split("/")
        if not half:
            layers.setdefault(int(layer), {})[name] = value
        elif half == ["decay"]:
            step = AffineStep(value, arrays[f"{layer}/{name}/from_zero"])
            steps.setdefault(int(layer), {})[name] = step
    return Collected(
        **{field: manifest[field] for field in MANIFEST_FIELDS},
        layers=layers,
        part=Part(manifest["offset"], manifest["total"]),
        steps={layer: steps.get(layer, {}) for layer in layers},
    )
