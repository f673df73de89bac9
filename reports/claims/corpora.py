"""Rules for calibration corpora, put into the names of the corpora that a panel has."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from reports.claims.selection import Cell
from reports.claims.vocabulary import EVERY, GENERAL, GENERATION, MATCHED, MIXED, SHIFTED, Contrast, Contrasts, said

# What a corpus is to a domain, or to a rule; of several that a panel has the first is taken, of none the first at all.
CORPORA: Mapping[str, tuple[str, ...]] = {
    "code": ("code", "evol_codealpaca", "mixture_of_thoughts_code", "stdlib_code", "swe_smith"),
    "math": ("math", "math_sft", "math_solutions", "mixture_of_thoughts_math"),
    "writing": ("writing", "writing_prompts", "plays"),
    GENERAL: ("real_text", "c4", "web_text", "wikipedia_text"),
    MIXED: ("mixed", "mixture"),
}
_RULES = (MATCHED, SHIFTED, GENERAL, MIXED, EVERY)


@dataclass(frozen=True)
class Corpora:
    """``present`` are a panel's corpora, ``domains`` those in which its models write."""

    present: tuple[str, ...]
    domains: tuple[str, ...]

    def of(self, role: str) -> str:
        names = CORPORA[role]
        return next((name for name in names if name in self.present), names[0])

    def matched_domains(self) -> tuple[str, ...]:
        """The domains that some corpus is about."""
        return tuple(domain for domain in self.domains if domain in CORPORA)

    def concrete(self, contrast: Contrast) -> Contrast:
        """The contrast with corpora in place of rules (all but that of every corpus)."""
        terms = [each for term in contrast.terms for each in self._terms(*term)]
        return replace(contrast, terms=tuple(terms))

    def cell(self, cell: Cell) -> Cell:
        """The cell with a corpus in place of a rule that is one corpus."""
        return replace(cell, calibration=self.of(cell.calibration)) if cell.calibration in (GENERAL, MIXED) else cell

    def _terms(self, weight: float, name: str, cell: Cell) -> list[tuple[float, str, Cell]]:
        rule = cell.calibration
        if rule not in (MATCHED, SHIFTED):
            return [(weight, name, self.cell(cell))]
        domains = self.matched_domains() or tuple(CORPORA)[:3]
        scored = domains if name == GENERATION else (name,)
        pairs = [(one, other) for one in scored for other in domains if (one == other) == (rule == MATCHED)]
        return [(weight / len(pairs), name, replace(cell, calibration=self.of(corpus))) for name, corpus in pairs]


def on(contrast: Contrast, corpus: str) -> Contrast:
    """The contrast with that corpus (or rule) wherever it goes by a rule."""
    terms = [
        (w, name, replace(c, calibration=corpus) if c.calibration in _RULES else c) for w, name, c in contrast.terms
    ]
    return replace(contrast, terms=tuple(terms))


def in_domain(contrast: Contrast, domain: str) -> Contrast:
    """The same of a domain in place of the average over domains."""
    terms = tuple((w, domain if name == GENERATION else name, cell) for w, name, cell in contrast.terms)
    return replace(contrast, name=f"{said(domain)}: {contrast.name}", terms=terms)


def without_domain(contrast: Contrast, left_out: str, domains: Sequence[str]) -> Contrast:
    """The same of the mean over the other domains."""
    rest = [domain for domain in domains if domain != left_out]
    terms = [
        (weight / len(rest) if name == GENERATION else weight, each, cell)
        for weight, name, cell in contrast.terms
        for each in (rest if name == GENERATION else [name])
    ]
    return replace(contrast, terms=tuple(terms))


def has_parts(contrast: Contrast) -> bool:
    """Whether it is of averages over domains alone."""
    return all(name == GENERATION for _, name, _ in contrast.terms)


def has_rule(contrast: Contrast) -> bool:
    return any(cell.calibration in _RULES for *_, cell in contrast.terms)


def on_every(test: Contrasts, present: Sequence[str]) -> Contrasts:
    """A contrast for each corpus in place of one on every corpus."""
    found: list[Contrast] = []
    for contrast in test.contrasts:
        if any(cell.calibration == EVERY for *_, cell in contrast.terms):
            found += [replace(on(contrast, name), name=f"{name}: {contrast.name}") for name in present or (MIXED,)]
        else:
            found.append(contrast)
    return replace(test, contrasts=tuple(found))
