"""Where a checkpoint lies: a local folder, or a model of the hub that is fetched first."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import constants, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

from harness.checkpoints.config import read_config
from harness.errors import WinnowError, first_line
from harness.files import is_full

_NEEDED = ["*.json", "*.safetensors", "*.txt", "*.model", "*.tiktoken", "*.py", "*.jinja", "LICENSE*", "NOTICE*"]


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
        if is_full(error):
            advice = f"free some in {constants.HF_HUB_CACHE}, or set HF_HUB_CACHE to a folder on a larger disk"
            raise WinnowError(f"no space left to fetch {model}: {advice}, and run again: it goes on") from error
        raise WinnowError(f"{model} cannot be fetched: {first_line(error)}") from error
