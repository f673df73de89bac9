"""Tables of what accuracy does not show: whether confidence is right, and whether answers hold when asked again."""

from collections.abc import Sequence

from harness.contracts.record import Record
from reports.numbers.baselines import absent
from reports.numbers.best import BOLD_NOTE
from reports.numbers.load import NO_CORPUS, Row
from reports.numbers.measures import (
    Results,
    part_measures,
)
from reports.numbers.probes import CALIBRATION_MEASURES, consistency_measures, diagnostic_measures
from reports.numbers.statistics import Measure, estimate
from reports.tables.formats import MISSING, Table, format_estimate, format_span
from reports.tables.scores import scores_table

ECE = CALIBRATION_MEASURES[0]
_ECE_NOTE = (
    "ECE is the mean over questions of the gap between mean confidence and share of right answers in a question's bin "
    "of confidence; confidence is the largest softmax probability over the choices' log-likelihoods. It is biased "
    "upwards, by what a perfectly calibrated model of the same confidences shows at most (ECE by chance), and its 95 % "
    "interval allows for that"
)
_CALIBRATION_NOTE = (
    "Multiple choice and how well its confidence is calibrated (n: {n} questions). {ece}: it reaches from that and "
    "1.96 bootstrapped standard errors below to 1.96 above. 15 bins of one width; of equal mass in adaptive ECE. ECE "
    "by chance stands with the range that holds 95 % of it: an ECE in there is no sign of bad calibration. Brier score "
    "is the squared distance of the probabilities from the right answer (0 to 2), overconfidence mean confidence less "
    "accuracy; both with intervals from a bootstrap over questions. {bold}; the last column and ECE by chance are not "
    "ranked."
)
_CONSISTENCY_NOTE = (
    "The share of questions with the same answer in every wording (95 % intervals by Wilson) beside the mean accuracy "
    "over wordings (bootstrap over questions; n: {n} questions a form). Paraphrase: every wording of a fact, or a "
    "program with each step in other words. Negation: the program of the opposite instruction (keep, drop), which must "
    "be the other one of two; a model that does not read the word has 0 %. Permutation: the choices listed in the "
    "question and turned round, a form in which the reference model was never trained, so its accuracy says how far it "
    "is followed; an order task does the same with lettered choices. Two models of one accuracy can differ in it. "
    "{bold}."
)
_SHIFT_NOTE = (
    "Down the method, its ratio and the corpus that it was calibrated on; across the domain of the questions. {ece} "
    "(n: {n} questions a domain)."
)


def calibration_table(results: Results, corpus: str) -> Table | None:
    """None where no record has a calibration error."""
    records = results.panel.records()
    measures = [m for m in diagnostic_measures(records) if m in CALIBRATION_MEASURES]
    if not measures:
        return None
    choices = [results.averages.choice] if results.averages.choice is not None else []
    note = _CALIBRATION_NOTE.format(n=_counts(records, measures), ece=_ECE_NOTE, bold=BOLD_NOTE.capitalize())
    return scores_table(results, corpus, "Calibration of answers", choices + measures, note)


def consistency_table(results: Results, corpus: str) -> Table | None:
    """None where nothing was asked twice."""
    records = results.panel.records()
    measures = consistency_measures(records)
    if not measures:
        return None
    note = _CONSISTENCY_NOTE.format(n=_counts(records, measures), bold=BOLD_NOTE.capitalize())
    return scores_table(results, corpus, "Consistency of answers", measures, note)


def shift_table(results: Results) -> Table | None:
    """Calibration error by calibration corpus and domain of the questions: calibrated on A, evaluated on B.

    None where fewer than two corpora or two domains have it.
    """
    records = results.panel.records()
    domains = part_measures(records, ECE)
    rows = sorted(results.panel.rows, key=lambda row: (row.method, row.ratio, row.calibration))
    shown = [row for row in rows if row.calibration != NO_CORPUS and estimate(ECE, row.records) is not None]
    if len(domains) < 2 or len({row.calibration for row in shown}) < 2:
        return None
    baseline = [] if results.panel.baseline is None else [results.panel.baseline]
    body = [_line(row, [*domains, ECE]) for row in (*baseline, *shown)]
    header = ["method", "corpus", "ratio", *(m.label for m in domains), "all"]
    note = _SHIFT_NOTE.format(ece=_ECE_NOTE, n=_counts(records, domains))
    note += f" {told}" if (told := absent(results.panel)) else ""
    return Table("Calibration error by corpus and domain", header, body, note)


def _line(row: Row, measures: Sequence[Measure]) -> list[str]:
    found = [estimate(measure, row.records) for measure in measures]
    corpus = MISSING if row.calibration == NO_CORPUS else row.calibration
    return [
        row.label, corpus, f"{row.ratio:g}",
        *(MISSING if one is None else format_estimate(ECE.kind, one) for one in found),
    ]  # fmt: skip


def _counts(records: Sequence[Record], measures: Sequence[Measure]) -> str:
    wanted = {(part.task, part.metric, part.of) for measure in measures for part in measure.parts}
    return format_span({s.n for record in records for s in record.scores if (s.task, s.metric, s.part) in wanted})
