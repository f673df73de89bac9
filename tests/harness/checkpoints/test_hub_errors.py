"""One line for everything that the hub's client raises: what is wrong, and what to do."""

import errno
from pathlib import Path

import httpx
import pytest
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
)

from harness.checkpoints import hub
from harness.checkpoints.hub import HubOutOfReach, fetch_config, resolve_checkpoint
from harness.errors import WinnowError

NAME = "somebody/a-model"


def http(kind: type[HfHubHTTPError], status: int) -> HfHubHTTPError:
    response = httpx.Response(status, request=httpx.Request("GET", f"https://huggingface.co/{NAME}"))
    return kind(f"{status} Client Error.\n\nAccess to it is restricted.", response=response)


CASES = {
    "gated": (http(GatedRepoError, 403), "'somebody/a-model' is gated.*huggingface.co/somebody/a-model.*hf auth login"),
    "missing": (http(RepositoryNotFoundError, 401), "neither a local folder nor on the hub.*hf auth login"),
    "not in the cache": (
        LocalEntryNotFoundError("no network"),
        "out of reach.*hf download somebody/a-model.*winnow-data",
    ),
    "offline": (OfflineModeIsEnabled("offline"), "out of reach.*HF_HUB_OFFLINE"),
    "no config": (http(RemoteEntryNotFoundError, 404), "no config.json on the hub"),
    "full disk": (OSError(errno.ENOSPC, "No space left on device"), "no space left to fetch.*HF_HUB_CACHE"),
    "server": (http(HfHubHTTPError, 500), "cannot be fetched: 500 Client Error"),
    "network": (httpx.ConnectError("connection refused"), "cannot be fetched: connection refused"),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("fetch", [resolve_checkpoint, fetch_config])
def test_one_line_says_what_to_do(monkeypatch, fetch, case):
    error, message = CASES[case]

    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(hub, "snapshot_download", fail)
    monkeypatch.setattr(hub, "hf_hub_download", fail)
    with pytest.raises(WinnowError, match=message) as caught:
        fetch(NAME)
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, HubOutOfReach) == (case in ("not in the cache", "offline"))


def test_a_config_that_is_no_json_is_said_so(monkeypatch, tmp_path: Path):
    (tmp_path / "config.json").write_text("{")
    monkeypatch.setattr(hub, "hf_hub_download", lambda name, file: str(tmp_path / file))
    with pytest.raises(WinnowError, match="not valid JSON"):
        fetch_config(NAME)
