"""The cells that claims ask for are those that the experiments run."""

from itertools import product

from hydra import compose, initialize_config_module

from reports.claims.corpora import Corpora, on_every
from reports.claims.list import CLAIMS
from reports.claims.selection import Cell
from reports.claims.vocabulary import Claim, Contrasts

EXPERIMENTS = ("claims", "reference", "channels_vs_experts", "routing", "frontier")
CORPORA = Corpora((), ("code", "math", "writing"))
OF_CHANNELS = ("mixed", "code", "math", "writing", "knowledge")
READ_NO_CORPUS = ("random", "magnitude_channels", "weight_norm")
Job = tuple[str, float, str, frozenset, str]


def values(given) -> list[str]:
    text = str(given)
    return [str(one) for one in eval(text)] if text.startswith("range(") else text.split(",")  # noqa: S307


def jobs_of(config) -> set[Job]:
    sweeper = config.hydra.sweeper
    found = set()
    for grid in sweeper.get("grids") or [sweeper.params]:
        names = list(grid)
        for job in product(*(values(grid[name]) for name in names)):
            said = dict(zip(names, job, strict=True))
            layers = said.pop("diagnostics", "none")
            method, ratio, corpus = said.pop("method"), float(said.pop("ratio")), said.pop("calibration", "mixed")
            settings = frozenset((k, v) for k, v in said.items() if k not in ("seed", "model") and v != "none")
            found |= {(method, ratio, corpus, settings, one) for one in (layers, "none")}
    return found


def cells_of(claim: Claim) -> list[Cell]:
    if not isinstance(claim.test, Contrasts):
        return [CORPORA.cell(cell) for cell in claim.cells()]
    contrasts = on_every(claim.test, OF_CHANNELS).contrasts
    return [cell for contrast in contrasts for *_, cell in CORPORA.concrete(contrast).terms]


def test_every_cell_is_a_job_and_the_suite_has_every_task() -> None:
    with initialize_config_module("conf", version_base="1.3"):
        configs = [compose("config", [f"+experiment={name}"], return_hydra_config=True) for name in EXPERIMENTS]
        others = [set(compose("config", [f"suite={name}"]).suite.tasks) for name in ("diagnostics", "answers")]
    assert set(configs[0].suite.tasks) == set.union(*others)
    jobs = set().union(*map(jobs_of, configs))
    asked = 0
    for claim in CLAIMS:
        layers = "layers" if "diagnostics=layers" in claim.also else "none"
        for cell in cells_of(claim):
            settings = frozenset((key, str(value)) for key, value in cell.settings)
            if cell.method == "none" and not settings:
                continue
            corpora = {cell.calibration, *(["mixed"] if cell.method in READ_NO_CORPUS else [])}
            asked += 1
            assert any((cell.method, cell.ratio, one, settings, layers) in jobs for one in corpora), (
                claim.id,
                str(cell),
            )
    assert asked > 200
