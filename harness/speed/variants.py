"""The reference MoE and compressed versions of it, on which the speed of the backends is measured."""

from fractions import Fraction
from pathlib import Path

from harness.calibration.calibrate import calibrate
from harness.calibration.tokens import tokenize
from harness.checkpoints.apply_plan import apply_plan
from harness.checkpoints.load import load_model
from harness.checkpoints.tokenizer import load_tokenizer
from harness.contracts.method import Method
from harness.reference import model_path
from methods.hc_smoe import HCSMoE
from methods.prune_experts import ExpertPruning
from tasks.reference.corpus import calibration_corpus

HALF = Fraction(1, 2)
METHODS: dict[str, Method] = {
    "50 % pruned": ExpertPruning("reap", "reap"),
    "50 % merged": HCSMoE("hc_smoe"),
    "non-uniform": ExpertPruning("reap", "reap", scope="global"),  # other numbers of experts in each layer
}


def checkpoints(folder: Path, names: tuple[str, ...] = tuple(METHODS)) -> dict[str, Path]:
    """The folder of the uncompressed reference MoE, and of those of ``METHODS`` named, written below ``folder``."""
    source = Path(model_path())
    documents = calibration_corpus(dict.fromkeys(("code", "math", "writing", "knowledge"), 60), seed=0)
    sequences = tokenize(documents, load_tokenizer(source), 256)
    needed = frozenset(statistic for name in names for statistic in METHODS[name].requires)
    statistics, _ = calibrate(source, lambda: load_model(source, "float32"), sequences, needed, folder)
    found = {"baseline": source}
    for number, name in enumerate(names):
        plan = METHODS[name].decide(statistics, HALF, 0).plan
        apply_plan(source, plan, folder / str(number))
        found[name] = folder / str(number)
    return found
