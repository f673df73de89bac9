"""Findings as Markdown, CSV and JSON, and as lines for the terminal."""

import csv
import io
import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from reports.claims.contrasting import bound_text
from reports.claims.opening import opening
from reports.claims.over_models import OverModels, models_table, over_models
from reports.claims.over_models import as_json as over_models_as_json
from reports.claims.panel import bars_table, has_shipped, tried_table
from reports.claims.selection import commands
from reports.claims.tested import Tested
from reports.claims.verdicts import VERDICTS, Evidence, Finding, OfCorpus
from reports.claims.view import BROKEN, NOT_MEASURED, NOT_RUN
from reports.claims.vocabulary import RULES
from reports.numbers.baselines import absent, elsewhere
from reports.numbers.broken import failed_cells, faults
from reports.numbers.load import Panel
from reports.numbers.paired import ALPHA
from reports.numbers.versions import mixed_versions
from reports.tables.comparisons import effect_text, p_text
from reports.tables.formats import MISSING, Table, in_csv, in_markdown, to_markdown

_RULES = """\
Every contrast is taken over the items that all its cells answered, tasks by themselves, by Student's t with the
squared standard errors of items and of seeds added up; perplexities by their logarithm. Where items share a template
or a field of their prompt the error over these clusters is taken if it is the larger one, and the interval of
independent items stands beside. A claim holds where its effect is above the margin (the smallest that matters) or, of
a stated size, above that; it is reversed where the effect is below minus the margin, negligible where two one-sided
tests put it inside the margin, and smaller than said where it is below the size that was stated. A claim of several
contrasts holds if all do. p is two-sided, of the verdict that is best supported, and corrected by Holm's rule over the
{tested} tests; where it is not below 0.05 the claim is undecided, with the number of items at which an effect of the
size seen would be found with 80 % power at the level of a single claim ({level:.2g}). Layers are no sample of
anything: what each has is averaged over them and tested on the parts of the calibration tokens (jackknife) or the
groups of merged experts behind it. Intervals are 95 %, of single contrasts. "seeds 1/3" counts the seeds of each cell:
what chance does to a cell of a single seed is not in its interval. The verdicts are about the model and the settings
named here, no others."""


def tally(findings: Sequence[Finding]) -> str:
    counts = {verdict: sum(one.verdict == verdict for one in findings) for verdict in VERDICTS}
    return ", ".join(f"{count} {verdict}" for verdict, count in counts.items())


def plain(finding: Finding, several: bool) -> list[str]:
    where = f" [{panel_name(finding.panel)}]" if several else ""
    p = "" if finding.corrected is None else f"  ({p_text(finding.corrected)})"
    claim = finding.claim
    lines = [f"{finding.verdict.upper():17} {claim.id}{where}{p}", f"    {claim.says} [{claim.corpus}]"]
    lines += [f"    {line}" for line in seen(finding)]
    return lines + [f"    $ {command}" for command in commands_of(finding)]


def commands_of(finding: Finding) -> list[str]:
    claim, panel, folder = finding.claim, finding.panel, finding.view.folder or Path("results/runs")
    if not finding.missing:
        return []
    if claim.suite and claim.suite != panel.suite:
        # Another suite has records of its own: all cells of the claim have to be run in it.
        cells = [finding.view.corpora.cell(cell) for cell in claim.cells()]
        return commands(cells, panel, claim.suite, folder, claim.also)
    # A cell that has its record is not run again, unless for what another setting adds to it.
    lacking = [one for one in finding.missing if one.why == NOT_RUN or one.why.startswith(NOT_MEASURED)]
    cells = [one.cell for one in finding.missing if one in lacking or claim.also and BROKEN not in one.why]
    return commands(list(dict.fromkeys(cells)), panel, "", folder, claim.also)


def of_baselines(panels: Sequence[Panel]) -> list[str]:
    """A sentence for each panel whose uncompressed model has no record, or one from elsewhere."""
    return [f"{panel_name(panel)}: {told}" for panel in panels if (told := absent(panel) or elsewhere(panel))]


def of_versions(panels: Sequence[Panel]) -> list[str]:
    told = mixed_versions([record for panel in panels for record in panel.records()])
    return (
        [f"Results of different versions stand side by side: {'; '.join(told)}; they do not compare."] if told else []
    )


def panel_name(panel: Panel) -> str:
    return f"model {panel.model}, suite {panel.suite}, backend {panel.backend}"


def seen(finding: Finding) -> list[str]:
    lines = [one.text for one in finding.evidence]
    for one in finding.evidence if len(finding.evidence) > 1 else ():
        if one.verdict:
            lines.append(f"{one.name}: {one.verdict}{f' ({one.alone} alone)' if one.alone else ''}")
    if len(finding.evidence) == 1 and (alone := finding.evidence[0].alone):
        lines.append(f"{alone} alone carries it: the mean of the others is not on that side of 0")
    more = [f"{finding.verdict}: {finding.more}"] if finding.more else []
    note = [f"only {finding.claim.note}"] if finding.claim.note and finding.evidence else []
    return lines + more + note + [f"{one.cell}: {one.why}" for one in finding.missing]


# --- Markdown ---------------------------------------------------------------------------------------------------------


def markdown(found: Tested, title: str) -> str:
    findings = found.findings
    several = len(found.panels) > 1
    tested = sum(one.p is not None for one in findings)
    body = [
        [
            f"{one.claim.says} ({one.claim.source})",
            one.verdict,
            one.claim.corpus,
            "" if one.corrected is None else p_text(one.corrected),
            "; ".join(seen(one)) + (f" [{panel_name(one.panel)}]" if several else ""),
        ]
        for one in findings
    ]
    rules = _RULES.format(tested=tested, level=ALPHA / max(1, tested)).replace("\n", " ")
    names = dict.fromkeys(in_markdown(panel_name(panel)) for panel in found.panels)
    lines = [f"# Claims, tested on {in_markdown(title)}", "", *names, ""]
    lines += [f"{tally(findings)}.", ""]
    lines += [in_markdown(line) for sentence in opening(findings) for line in (sentence, "")]
    lines += [
        in_markdown(line) for told in (*of_baselines(found.panels), *of_versions(found.panels)) for line in (told, "")
    ]
    lines += section("Left out", [f"- {in_markdown(line)}" for line in found.damaged])
    lines += [to_markdown(Table("Claims", ["claim", "verdict", "corpus", "p", "what was seen"], body, rules))]
    tried = tried_table() if has_shipped(found.panels) else None
    of_models = [models_table(over_models(findings)), bars_table(found.panels), tried]
    lines += [line for table in of_models if table for line in (f"## {table.title}", "", to_markdown(table))]
    used = dict.fromkeys(one.claim.corpus for one in findings if one.claim.corpus in RULES)
    lines += section("Corpora", [f"- {rule}: {RULES[rule]}" for rule in used])
    lines += section("By corpus and domain", [line for one in findings for line in _by_corpus(one)])
    lines += section("Missing cells", [line for one in findings for line in _lacking(one)])
    lines += section("Broken cells", _broken(found.panels))
    failed = [line for folder in dict.fromkeys(found.folders) for line in failed_cells(folder)]
    lines += section("Cells of the last sweep that failed", [f"- {in_markdown(line)}" for line in failed])
    return "\n".join(lines)


def section(title: str, lines: Sequence[str]) -> list[str]:
    return [f"## {title}", "", *lines, ""] if lines else []


def _by_corpus(finding: Finding) -> list[str]:
    """A small table for each contrast that other corpora or domains show more of."""
    lines = []
    for one in finding.evidence:
        domains = list(dict.fromkeys(domain for row in one.corpora for domain in row.parts))
        if len(one.corpora) < 2 and len(domains) < 2:
            continue
        body = [
            [
                _corpus_name(row, finding),
                row.of,
                _effect(one, row.whole),
                *(_effect(one, row.parts.get(d)) for d in domains),
            ]
            for row in one.corpora
        ]
        header = ["corpus", "suite", "all" if domains else "effect", *domains]
        head = f"**{finding.claim.id}**: {finding.verdict} ({one.name})"
        lines += [in_markdown(head), "", to_markdown(Table("", header, body, ""))]
    return lines


def _corpus_name(row: OfCorpus, finding: Finding) -> str:
    return row.corpus or f"{finding.claim.corpus} (the claim)"


def _effect(one: Evidence, found: Any) -> str:
    return MISSING if found is None else effect_text(one.kind, found)


def _lacking(finding: Finding) -> list[str]:
    found = commands_of(finding)
    ready = f" (`winnow -m +experiment={finding.claim.experiment}` runs them)" if finding.claim.experiment else ""
    return [f"- {finding.claim.id}{ready}:", "", *(f"      {command}" for command in found), ""] if found else []


def _broken(panels: Sequence[Panel]) -> list[str]:
    return [
        in_markdown(f"- {row.label}, ratio {row.ratio:g}, {row.calibration}: {fault}")
        for panel in panels
        for row in panel.all_rows()
        for record in row.records
        for fault in faults(record)
    ]


# --- CSV and JSON -----------------------------------------------------------------------------------------------------


def as_csv(findings: Sequence[Finding]) -> str:
    """One line a contrast; a claim without any has one line."""
    out = io.StringIO()
    names = ("effect", "low", "high", "error", "n", "paired")
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(
        ["claim", "verdict", "p", "p_corrected", "corpus", "model", "suite", "backend"]
        + ["contrast", "kind", "margin", "least", "contrast_verdict", *names, "seeds", "p_above", "p_below", "p_within"]
        + ["missing", "commands"]
    )
    for finding in findings:
        panel = finding.panel
        start = [finding.claim.id, finding.verdict, _cell(finding.p), _cell(finding.corrected), finding.claim.corpus]
        start += [in_csv(name) for name in (panel.model, panel.suite, panel.backend)]
        end = ["; ".join(f"{m.cell}: {m.why}" for m in finding.missing), "; ".join(commands_of(finding))]
        contrasts: list[Evidence | None] = [*finding.evidence] or [None]
        for one in contrasts:
            middle = [""] * 5 if one is None else [in_csv(one.name), one.kind, "", "", one.verdict]
            numbers = [""] * (len(names) + 4)
            if one is not None and one.comparison is not None:
                c = one.comparison
                numbers = [_cell(getattr(c, name)) for name in names] + ["/".join(map(str, c.seeds)), "", "", ""]
                if one.contrast is not None:
                    middle[2:4] = [_cell(one.contrast.margin), _cell(one.contrast.least)]
                    numbers[-3:] = [_cell(value) for value in _tails(one).values()]
            writer.writerow(start + middle + numbers + end)
    return out.getvalue()


def _tails(one: Evidence) -> dict[str, float]:
    """One-sided: above the bar, below it (or minus the margin), inside the margin."""
    c, contrast = one.comparison, one.contrast
    assert c is not None and contrast is not None
    low = -contrast.margin if contrast.least is None else contrast.least
    return {"p_above": c.p_above(contrast.bar), "p_below": c.p_below(low), "p_within": c.p_within(contrast.margin)}


def _cell(value: float | bool | None) -> str:
    return "" if value is None else str(value).lower() if isinstance(value, bool) else repr(float(value))


def as_json(findings: Sequence[Finding]) -> str:
    over = {one.finding.claim.id: one for one in over_models(findings)}
    return json.dumps([_as_json(f, over.get(f.claim.id)) for f in findings], indent=1, ensure_ascii=False) + "\n"


def _as_json(finding: Finding, over: OverModels | None) -> dict[str, Any]:
    claim, panel = finding.claim, finding.panel
    return {
        "id": claim.id,
        "says": claim.says,
        "source": claim.source,
        "corpus": claim.corpus,
        "rule": RULES.get(claim.corpus, claim.corpus),
        "headline": claim.headline,
        "verdict": finding.verdict,
        "p": finding.p,
        "p_corrected": finding.corrected,
        "model": panel.model,
        "suite": panel.suite,
        "backend": panel.backend,
        "evidence": [_evidence_as_json(one) for one in finding.evidence],
        "more": finding.more,
        "note": claim.note,
        "missing": [{"cell": str(one.cell), "why": one.why} for one in finding.missing],
        "commands": commands_of(finding),
        **({"over_models": over_models_as_json(over)} if over else {}),
    }


def _evidence_as_json(one: Evidence) -> dict[str, Any]:
    told: dict[str, Any] = {"name": one.name, "kind": one.kind, "text": one.text, "verdict": one.verdict}
    if one.comparison is None:
        return told
    told |= {name: _finite(value) for name, value in asdict(one.comparison).items()}
    if one.contrast is not None:
        told |= {"margin": one.contrast.margin, "least": one.contrast.least, "alone": one.alone}
        told |= {"margin_text": bound_text(one.kind, one.contrast.margin)} | _tails(one)
        told["corpora"] = [
            {
                "corpus": row.corpus,
                "suite": row.of,
                "all": _effect(one, row.whole),
                "parts": {domain: _effect(one, part) for domain, part in row.parts.items()},
            }
            for row in one.corpora
        ]
    return told


def _finite(value: Any) -> Any:
    """JSON has no infinity."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
