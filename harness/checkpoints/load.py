"""Load any supported checkpoint, plain or compact, local or from the hub, into a transformers model."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from harness.checkpoints.building import (
    check_report,
    experts_padded_where_ragged,
    heed_layouts,
    layers_built_as_stored,
    loading_faults,
    standins_left_to_us,
)
from harness.checkpoints.check import check_checkpoint, check_names
from harness.checkpoints.config import read_config, read_generation_config
from harness.checkpoints.hub import resolve_checkpoint
from harness.checkpoints.layout import layer_layouts
from harness.checkpoints.quantize import served_folder
from harness.checkpoints.skipping import read_betas
from harness.errors import WinnowError
from harness.families.table import family_of


def load_model(
    path_or_hub_id: str | Path,
    dtype: str | torch.dtype = "auto",
    device: str | dict[str, Any] = "cpu",
    experts_implementation: str | None = None,
) -> PreTrainedModel:
    """The model, in evaluation mode, every parameter read from the checkpoint; experts of a ragged layer are padded.

    Quantised weights are dequantised (``harness.checkpoints.quantize.served_folder``), at the size of unquantised ones.
    Where config.json says so, tokens skip experts (``harness.checkpoints.skipping``). ``dtype`` "auto" is that of the
    checkpoint. ``device`` is one device, or a device map of transformers ("auto" spreads the layers).
    ``experts_implementation`` as in transformers ("eager", "batched_mm", "grouped_mm"); None takes its default, or
    "eager" where the default cannot run with the stored widths.

    Raises WinnowError where the model cannot be found, its architecture has no row in the family table, or
    its weights are absent, incomplete or do not fit config.json; no parameter is ever left at random.
    """
    folder = resolve_checkpoint(path_or_hub_id)
    config = read_config(folder)
    read_generation_config(folder)  # transformers reads it too, and says less of what is wrong with it
    family = family_of(config)
    check_checkpoint(folder, family, config)
    check_names(folder, config)
    layouts, betas = layer_layouts(config, family), read_betas(config)
    options: dict[str, Any] = {"dtype": dtype, "output_loading_info": True, "local_files_only": True}
    if device != "cpu":
        options["device_map"] = device
    if experts_implementation is not None:
        options["experts_implementation"] = experts_implementation
    with (
        loading_faults(folder),
        served_folder(folder) as stored,
        layers_built_as_stored(family, layouts),
        experts_padded_where_ragged(layouts),
        standins_left_to_us(),
    ):
        loaded: Any = AutoModelForCausalLM.from_pretrained(stored, **options)
    model, report = loaded
    check_report(folder, report)
    heed_layouts(model, family, layouts, betas, folder, experts_implementation)
    return model.eval()


def check_device(device: Any) -> None:
    """Raises WinnowError where ``device`` is not there: the name of one, or a device map of transformers."""
    names = device.values() if isinstance(device, Mapping) else [device]
    for name in names:
        kind, _, number = str(name).partition(":")
        if isinstance(name, int) or kind == "cuda":
            found, place = torch.cuda.device_count(), name if isinstance(name, int) else int(number or 0)
            if place >= found:
                raise WinnowError(f"model.device={name}: there are {found} CUDA GPUs here; take cpu, or auto")
        elif kind in ("mps", "xpu") and not getattr(torch, kind).is_available():
            raise WinnowError(f"model.device={name}: there is none here; take cpu, or auto")
