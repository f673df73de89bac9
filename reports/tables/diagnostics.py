"""Tables beside the scores: how far distributions drift from the uncompressed model's, and what the texts look like."""

from collections.abc import Sequence

from harness.contracts.record import Record, Score
from reports.numbers.best import BOLD_NOTE
from reports.numbers.measures import Results
from reports.numbers.probes import DRIFT, DRIFT_MEASURES, GENERATION, TEXT_MEASURES, diagnostic_measures
from reports.numbers.statistics import Measure
from reports.tables.formats import Table, format_number, format_span
from reports.tables.scores import scores_table

_DRIFT_NOTE = (
    "Next-token distributions of the row's model against the uncompressed model's along the text that the latter "
    "wrote, teacher-forced over the first {positions} tokens of each text, a text counting once (n: {n} texts). "
    "Divergences and entropy are in nats; ESAP is the sum of min(p, q), the chance that a token drawn from one is "
    "accepted for the other. Free-running takes positions only up to the one at which the two models' own texts part; "
    "the parting position is its median, in tokens, over the texts that part, and same text the share that never do. "
    "Cross-perplexity is that of the row's own text under the uncompressed model: low where the text is ordinary, "
    "loops included. 95 % intervals, of shares of texts by Wilson, else from a bootstrap over texts; {bold}; entropy, "
    "parting position and cross-perplexity are not ranked.{truncated}"
)
_TRUNCATED = (
    " Only the likeliest tokens of each place are known: on average up to {mass} % of the mass lies outside of them. "
    "1 − ESAP may be larger by as much and JS by that times ln 2, and the KL divergences are lower bounds."
)
_GENERATION_NOTE = (
    "Of the texts written for the tasks (n: {n}): the share that ends in a loop (one phrase of at most 20 words, four "
    "times or more in a row, 16 words or more) and the share without a word; the mean length in words; "
    "self-repetition, the mean share of a text's 4-grams that another text of its task has too; diversity-n, different "
    "n-grams over all in a text, averaged, and distinct-n, in all texts together. In loops and empty texts {bold}."
)


def drift_table(results: Results, corpus: str) -> Table | None:
    """None where no record has drift."""
    seen = [score for record in _records(results) for score in record.scores if score.task == DRIFT]
    mass = max((score.value for score in seen if score.metric == "truncated_mass" and not score.part), default=0.0)
    last = max((int(s.part.rpartition("-")[2]) for s in seen if s.part.startswith("position")), default=0)
    truncated = _TRUNCATED.format(mass=format_number(mass, 2, 100)) if mass else ""
    note = _DRIFT_NOTE.format(
        n=_texts([s for s in seen if s.metric == "js"]), positions=last, truncated=truncated, bold=BOLD_NOTE
    )
    return _table(results, corpus, "Drift from the uncompressed model", DRIFT_MEASURES, note)


def generation_table(results: Results, corpus: str) -> Table | None:
    """None where the diagnostics of the texts were not run."""
    seen = [score for record in _records(results) for score in record.scores if score.task == GENERATION]
    return _table(results, corpus, "Texts", TEXT_MEASURES, _GENERATION_NOTE.format(n=_texts(seen), bold=BOLD_NOTE))


def _table(results: Results, corpus: str, title: str, wanted: Sequence[Measure], note: str) -> Table | None:
    measures = [m for m in diagnostic_measures(_records(results)) if m in wanted]
    return scores_table(results, corpus, title, measures, note) if measures else None


def _texts(scores: Sequence[Score]) -> str:
    """How many texts the scores over all positions and sources are of."""
    return format_span({score.n for score in scores if not score.part} or {0})


def _records(results: Results) -> list[Record]:
    return [record for row in results.panel.all_rows() for record in row.records]
