"""The dashboard of a sweep on Weights & Biases: a saved view whose panels show what ``reports.wandb.tracker`` logs."""

from collections.abc import Collection, Iterable, Sequence
from typing import Any

from harness.contracts.record import Record
from harness.errors import WinnowError
from reports.figures.drift import PANELS
from reports.figures.palette import looks
from reports.numbers.measures import averages, columns_of, main_measures
from reports.numbers.probes import DIVERSITY, DRIFT, GENERATION, diagnostic_measures
from reports.wandb.tracker import AVERAGE, key, run_id

RATIO = "cell.ratio"
BYTES = "size/weights_bytes"
_BASELINE_COLOUR = "#777777"
_TEXT_TASKS = (GENERATION, DIVERSITY)


def workspace(records: Sequence[Record], logged: Collection[str], entity: str, project: str, group: str) -> Any:
    """A ``wandb_workspaces`` Workspace of the runs in ``group``. Nothing is sent: ``save()`` does that.

    ``logged`` holds the names that the runs of ``records`` have; a panel of anything else is left out. Runs have the
    colours of their methods in the reports.

    Raises WinnowError where the package is not installed.
    """
    ws, wr = packages()
    measures = {key(m): m for m in [*main_measures(records), *diagnostic_measures(records)] if key(m) in logged}

    def against(x: Any, y: str, title: str) -> Any:
        return wr.ScatterPlot(title=title, x=x, y=wr.SummaryMetric(y))

    def over_ratio(keys: Iterable[str]) -> list[Any]:
        return [against(wr.Config(RATIO), one, f"{measures[one].label} against compression ratio") for one in keys]

    def tables(*names: str) -> list[Any]:
        return [wr.WeavePanelSummaryTable(table_name=name) for name in names if name in logged]

    def images(name: str, title: str) -> list[Any]:
        return [wr.MediaBrowser(title=title, media_keys=[name])] * (name in logged)

    choices = averages(columns_of(records)).choice
    choice = None if choices is None else key(choices)
    tasks = {one: measure.parts[0].task for one, measure in measures.items()}
    scores = over_ratio(one for one, task in tasks.items() if task != DRIFT and task not in _TEXT_TASKS)
    if AVERAGE in measures and choice is not None and choice in measures:
        scores.append(
            against(wr.SummaryMetric(choice), AVERAGE, f"generative average against {measures[choice].label}")
        )
    if AVERAGE in measures and BYTES in logged:
        scores.append(against(wr.SummaryMetric(BYTES), AVERAGE, "generative average against bytes of the weights"))
    drift = over_ratio(one for one, task in tasks.items() if task == DRIFT)
    drift += [
        wr.LinePlot(title=f"{title} by position", x="position", y=[f"by_position/{metric}"], log_x=True)
        for metric, _, title in PANELS
        if f"by_position/{metric}" in logged
    ]
    sections = {
        "Scores": scores,
        "Drift from the uncompressed model": drift + images("drift_figure", "drift by position"),
        "Diversity and length of the texts": over_ratio(one for one, task in tasks.items() if task in _TEXT_TASKS),
        "Generations": tables("generations"),
        "Experts": images("expert_map", "where each expert went") + tables("plan"),
        "Tables": tables("scores", "drift_positions"),
        "Cells side by side": [wr.RunComparer(diff_only="split")],
    }
    uncompressed = [run_id(record, group) for record in records if record.is_uncompressed()]
    return ws.Workspace(
        entity=entity,
        project=project,
        name=f"winnow {group}",
        sections=[ws.Section(name=name, panels=panels, is_open=True) for name, panels in sections.items() if panels],
        settings=ws.WorkspaceSettings(max_runs=max(10, len(records))),
        runset_settings=ws.RunsetSettings(
            filters=[ws.Metric("Group") == group],
            pinned_columns=[f"summary:{one}" for one in (AVERAGE, choice) if one in measures],
            run_settings={run: ws.RunSettings(color=colour) for run, colour in _colours(records, group).items()},
            baseline_run=uncompressed[0] if uncompressed else None,
        ),
        # The histograms of usage and saliency have no panel in the library: the service adds its own below.
        auto_generate_panels=True,
    )


def _colours(records: Sequence[Record], group: str) -> dict[str, str]:
    methods = looks(str(record.cell["method"]) for record in records if not record.is_uncompressed())
    return {
        run_id(record, group): _BASELINE_COLOUR if record.is_uncompressed() else methods[str(record.cell["method"])][0]
        for record in records
    }


def packages() -> tuple[Any, Any]:
    """The modules of workspaces and of panels. Raises WinnowError where they are not installed."""
    try:
        import wandb_workspaces.reports.v2 as wr
        import wandb_workspaces.workspaces as ws
    except ImportError as error:
        raise WinnowError(
            "the dashboard needs the package wandb-workspaces: pip install 'moe-winnow[track]'"
        ) from error
    return ws, wr
