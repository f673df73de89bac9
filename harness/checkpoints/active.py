"""``active=K``: tokens of the compressed model choose fewer experts than those of the original."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from harness.checkpoints.config import read_config
from harness.errors import WinnowError
from harness.families.family import Family
from harness.families.table import family_of
from harness.files import write_files


def check_active(active: int, family: Family, config: Mapping[str, Any]) -> None:
    """Raises WinnowError where tokens of a model with this config.json cannot choose so few, or choose no more."""
    top_k = family.top_k(config)
    if family.fixed_top_k:
        raise WinnowError(f"active={active}: the router of a {family.model_type} model can choose {top_k} alone")
    if top_k == 1:
        raise WinnowError(f"active={active}: a token of this model chooses one expert, and cannot choose fewer")
    if not 0 < active < top_k:
        raise WinnowError(
            f"active={active}: a token of this model chooses {top_k} experts; give a number from 1 to {top_k - 1}"
        )


def choose_fewer(folder: Path, active: int) -> None:
    """Have tokens choose ``active`` experts of the checkpoint in ``folder``, and its router do whatever else it does.

    Raises WinnowError as ``check_active`` does, where the plan has left no more to choose from.
    """
    config = read_config(folder)
    family = family_of(config)
    check_active(active, family, config)
    fewer = family.with_top_k(config, active)
    write_files({folder / "config.json": (json.dumps(fewer, indent=2) + "\n").encode()})
