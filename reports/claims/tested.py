"""Claims tested on folders of records: what is read for them, and what of it was left out."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from reports.claims.evaluate import evaluate_claims
from reports.claims.list import CLAIMS, MEASURES
from reports.claims.verdicts import Finding
from reports.numbers.detail_samples import with_detail_samples
from reports.numbers.groupings import read_groupings
from reports.numbers.layer_samples import with_layer_samples
from reports.numbers.load import Panel, load_sound


@dataclass(frozen=True)
class Tested:
    """``folders`` and ``panels`` are of one length: the folder of each panel."""

    findings: Sequence[Finding]
    folders: Sequence[Path]
    panels: Sequence[Panel]
    damaged: Sequence[str] = field(default=())


def claims_of_folders(folders: Sequence[Path]) -> Tested:
    """What is damaged is left out, and told. Raises WinnowError where a folder has no sound record."""
    loaded = [(folder, *load_sound(folder)) for folder in folders]
    damaged = [line for *_, lines in loaded for line in lines]
    return claims_of([(folder, panels) for folder, panels, _ in loaded], damaged)


def claims_of(
    loaded: Sequence[tuple[Path, Sequence[Panel]]], damaged: Sequence[str] = (), by_corpus: bool = True
) -> Tested:
    groupings: dict[str, tuple[str, ...]] = {}
    of_panels: list[Path] = []
    panels: list[Panel] = []
    for folder, own in loaded:
        panels += [with_detail_samples(folder, with_layer_samples(folder, panel)) for panel in own]
        of_panels += [folder] * len(own)
        groupings = {**read_groupings(folder, own), **groupings}
    findings = evaluate_claims(CLAIMS, panels, MEASURES, of_panels, groupings, by_corpus)
    return Tested(findings, of_panels, panels, damaged)
