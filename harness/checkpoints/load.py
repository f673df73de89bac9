"""Load any supported checkpoint, plain or compact, local or from the hub, into a transformers model."""

import errno
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.core_model_loading import MergeModulelist

from harness.checkpoints.quantize import served_folder
from harness.checkpoints.reader import LayerLayout, check_checkpoint, layer_layouts, padded
from harness.checkpoints.skipping import install as install_skipping
from harness.checkpoints.skipping import read_betas
from harness.checkpoints.tiktoken import VOCABULARY, code_file, read_tokenizer
from harness.errors import WinnowError
from harness.families.table import Family, family_of, read_config

_NEEDED = ["*.json", "*.safetensors", "*.txt", "*.model", "*.tiktoken", "*.py", "*.jinja", "LICENSE*", "NOTICE*"]
_VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "*.model", "*.tiktoken")


class HubOutOfReach(WinnowError):
    """There is no network, or HF_HUB_OFFLINE is set, and what is asked for is not in the hub's cache."""


def resolve_checkpoint(path_or_hub_id: str | Path) -> Path:
    """The local folder of a checkpoint; one of the hub is fetched (or found in its cache) first.

    Raises WinnowError where there is no such folder and the hub has no such model, does not give it to this user or
    cannot be reached (``HubOutOfReach``), and where the disk is full.
    """
    folder = local_folder(path_or_hub_id)
    if folder is not None:
        return folder
    with _hub_errors(str(path_or_hub_id)):
        return Path(snapshot_download(str(path_or_hub_id), allow_patterns=_NEEDED))


def fetch_config(hub_id: str) -> dict[str, Any]:
    """The config.json of a hub model, and nothing else of it. Raises WinnowError as ``resolve_checkpoint`` does."""
    with _hub_errors(hub_id):
        return read_config(Path(hf_hub_download(hub_id, "config.json")).parent)


def local_folder(path_or_hub_id: str | Path) -> Path | None:
    """The folder of that name, None for what can only be the name of a hub model. Raises WinnowError for neither."""
    folder = Path(path_or_hub_id).expanduser()
    if folder.is_dir():
        return folder
    name = str(path_or_hub_id)
    if isinstance(path_or_hub_id, Path) or folder.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise WinnowError(f"no model at {name}: there is no such folder")
    return None


@contextmanager
def _hub_errors(name: str) -> Iterator[None]:
    """What the hub's client raises while it fetches the model ``name``, as a WinnowError that says what to do."""
    model = f"model '{name}'"
    try:
        yield
    except WinnowError:
        raise
    except GatedRepoError as error:
        page = f"{constants.ENDPOINT}/{name}"
        raise WinnowError(f"{model} is gated: accept its terms at {page}, then log in with `hf auth login`") from error
    except RepositoryNotFoundError as error:
        advice = "check its name; a private model needs `hf auth login`"
        raise WinnowError(f"{model} is neither a local folder nor on the hub: {advice}") from error
    except HFValidationError as error:
        raise WinnowError(f"{model} is neither a local folder nor a name on the hub") from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        advice = (
            f"where there is a network (and HF_HUB_OFFLINE is not set), run `hf download {name} --local-dir DIR`, and "
            "give model.path=DIR here; data sets are fetched with `winnow-data stage`"
        )
        raise HubOutOfReach(f"{model} is not a local folder and the hub is out of reach: {advice}") from error
    except EntryNotFoundError as error:
        raise WinnowError(f"{model} has no config.json on the hub: it is not a transformers checkpoint") from error
    except Exception as error:  # the hub's client passes on whatever its HTTP library and the disk raise
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            advice = f"free some in {constants.HF_HUB_CACHE}, or set HF_HUB_CACHE to a folder on a larger disk"
            raise WinnowError(f"no space left to fetch {model}: {advice}, and run again: it goes on") from error
        raise WinnowError(f"{model} cannot be fetched: {_first_line(error)}") from error


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
    family = family_of(config)
    check_checkpoint(folder, family, config)
    layouts, betas = layer_layouts(config, family), read_betas(config)
    options: dict[str, Any] = {"dtype": dtype, "output_loading_info": True, "local_files_only": True}
    if device != "cpu":
        options["device_map"] = device
    if experts_implementation is not None:
        options["experts_implementation"] = experts_implementation
    try:
        with (
            served_folder(folder) as stored,
            _layers_built_as_stored(family, layouts),
            _experts_padded_where_ragged(layouts),
        ):
            loaded: Any = AutoModelForCausalLM.from_pretrained(stored, **options)
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
        raise WinnowError(f"cannot load the model {folder}: {_first_line(error)}") from error
    model, report = loaded
    for fault in ("missing_keys", "mismatched_keys", "unexpected_keys", "error_msgs"):
        if report[fault]:
            some = ", ".join(str(key) for key in sorted(report[fault], key=str)[:3])
            raise WinnowError(f"{folder} does not fit its config.json: {len(report[fault])} {fault}, such as {some}")
    for layer, layout in layouts.items():
        if not layout.is_direct:
            block = model.get_submodule(family.block.format(layer=layer))
            _install_route(block.get_submodule(family.experts), layout.route)
    install_skipping(model, family, betas)
    if not _grouped_mm_runs(model.dtype, layouts) and model.config._experts_implementation == "grouped_mm":
        if experts_implementation is not None:
            raise WinnowError(
                f"experts_implementation=grouped_mm cannot run {model.dtype} experts of "
                f"{sorted({layout.width for layout in layouts.values()})} channels: choose eager"
            )
        model.set_experts_implementation("eager")
    return model.eval()


def _grouped_mm_runs(dtype: torch.dtype, layouts: Mapping[int, LayerLayout]) -> bool:
    """torch.nn.functional.grouped_mm knows no float64, and wants rows of whole 16 bytes."""
    aligned = all(layout.width * dtype.itemsize % 16 == 0 for layout in layouts.values())
    return aligned and dtype != torch.float64


def load_tokenizer(path_or_hub_id: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint; its padding token is the end of text where it has none.

    Code that comes with a checkpoint is not run: such a tokenizer is made from its files (tokenizer.json, or what
    ``harness.checkpoints.tiktoken`` reads). Raises WinnowError where there is no usable tokenizer.
    """
    folder = resolve_checkpoint(path_or_hub_id)
    if not any(path for pattern in _VOCABULARIES for path in folder.glob(pattern)):
        # transformers would make up an empty tokenizer from the model type
        raise WinnowError(f"no usable tokenizer in {folder}: none of {', '.join(_VOCABULARIES)}")
    try:
        tokenizer = _open_tokenizer(folder)
    except Exception as error:  # tokenizers raises bare Exception on a broken file
        raise WinnowError(f"no usable tokenizer in {folder}: {_first_line(error)}") from error
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise WinnowError(f"the tokenizer in {folder} has neither a padding nor an end-of-text token")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _open_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    code = code_file(folder)
    if code and (folder / VOCABULARY).is_file():
        return read_tokenizer(folder)
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        if not code:
            raise
        reason = f"{code} is not run, as no code of a checkpoint is, and without it: {_first_line(error)}"
        raise WinnowError(reason) from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextmanager
def _layers_built_as_stored(family: Family, layouts: Mapping[int, LayerLayout]) -> Iterator[None]:
    """Meanwhile decoder layers are built with the numbers of experts, rows and channels in ``layouts``.

    The config is changed only while a layer is built and stays the one object that all modules share, so that
    a later ``set_attn_implementation`` or ``set_experts_implementation`` reaches every layer.
    """
    layer_class: Any = family.decoder_layer_class()
    original = layer_class.__init__
    block_name = family.block.split("{layer}.")[1]

    def build(self: torch.nn.Module, config: Any, layer_idx: int, *args: Any, **kwargs: Any) -> None:
        layout = layouts.get(layer_idx)
        if layout is None:
            return original(self, config, layer_idx, *args, **kwargs)
        plain_width = getattr(config, family.width_key)
        with _sizes_in(config, family, layout.rows, plain_width):
            original(self, config, layer_idx, *args, **kwargs)
        if (layout.experts, layout.width) != (layout.rows, plain_width):
            # rows are everywhere in a block, and its shared experts may have the width of plain routed ones
            donor = layer_class.__new__(layer_class)
            with _sizes_in(config, family, layout.experts, layout.width):
                original(donor, config, layer_idx, *args, **kwargs)
            experts = donor.get_submodule(f"{block_name}.{family.experts}")
            setattr(self.get_submodule(block_name), family.experts, experts)

    layer_class.__init__ = build
    try:
        yield
    finally:
        layer_class.__init__ = original


@contextmanager
def _experts_padded_where_ragged(layouts: Mapping[int, LayerLayout]) -> Iterator[None]:
    """Meanwhile transformers pads the matrices of a layer's experts to the widest before it stacks them.

    It does so as it reads, a stack at a time. That every expert has the width its layout gives is for
    ``check_checkpoint`` to say, and that the widest is the layer's for the comparison with the built model.
    """
    stacking: Any = MergeModulelist
    original = stacking.convert

    def convert(self: Any, input_dict: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        for matrices in input_dict.values():
            rows, columns = (max(matrix.shape[dim] for matrix in matrices) for dim in (0, 1))
            for index, matrix in enumerate(matrices):
                matrices[index] = padded(matrix, rows, columns)
        return original(self, input_dict, *args, **kwargs)

    if any(layout.is_ragged for layout in layouts.values()):
        stacking.convert = convert
    try:
        yield
    finally:
        stacking.convert = original


@contextmanager
def _sizes_in(config: Any, family: Family, experts: int, width: int) -> Iterator[None]:
    wanted = {**dict.fromkeys(family.num_experts_keys, experts), family.width_key: width}
    before = {key: getattr(config, key) for key in wanted if hasattr(config, key)}
    try:
        for key in before:
            setattr(config, key, wanted[key])
        yield
    finally:
        for key, value in before.items():
            setattr(config, key, value)


def _install_route(experts: torch.nn.Module, route: tuple[int, ...]) -> None:
    """Lead the router's indices to the stored experts; gate values of one expert then add up in the sum."""
    parameter = next(experts.parameters())
    device = "cpu" if parameter.is_meta else parameter.device  # meta: offloaded until its turn comes
    experts.register_buffer("route", torch.tensor(route, device=device), persistent=False)

    def follow(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden_states, indices, gates = args
        return hidden_states, module.route.to(indices.device)[indices], gates

    experts.register_forward_pre_hook(follow)
