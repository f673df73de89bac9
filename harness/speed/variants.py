"""The reference MoE and compressed versions of it, for benchmarks of the backends."""

from fractions import Fraction
from pathlib import Path
from typing import Any

from hydra.utils import get_method, instantiate

from harness.calibration.calibrate import calibrate
from harness.calibration.tokens import tokenize
from harness.checkpoints.apply_plan import apply_plan
from harness.checkpoints.load import load_model
from harness.checkpoints.tokenizer import load_tokenizer
from harness.reference import model_path

HALF = Fraction(1, 2)
_REAP = {"_target_": "methods.prune_experts.ExpertPruning", "name": "reap", "criterion": "reap"}
METHODS: dict[str, Any] = {
    "50 % pruned": _REAP,
    "50 % merged": {"_target_": "methods.hc_smoe.HCSMoE", "name": "hc_smoe"},
    "non-uniform": _REAP | {"scope": "global"},  # other numbers of experts in each layer
}


def checkpoints(folder: Path, names: tuple[str, ...] = tuple(METHODS)) -> dict[str, Path]:
    """The folder of the uncompressed reference MoE, and of those of ``METHODS`` named, written below ``folder``."""
    source = Path(model_path())
    documents = get_method("tasks.reference.corpus.calibration_corpus")(
        dict.fromkeys(("code", "math", "writing", "knowledge"), 60), seed=0
    )
    sequences = tokenize(documents, load_tokenizer(source), 256)
    methods = {name: instantiate(METHODS[name]) for name in names}
    needed = frozenset(statistic for method in methods.values() for statistic in method.requires)
    statistics, _ = calibrate(source, lambda: load_model(source, "float32"), sequences, needed, folder, progress=False)
    found = {"baseline": source}
    for number, (name, method) in enumerate(methods.items()):
        plan = method.decide(statistics, HALF, 0).plan
        apply_plan(source, plan, folder / str(number), progress=False)
        found[name] = folder / str(number)
    return found
