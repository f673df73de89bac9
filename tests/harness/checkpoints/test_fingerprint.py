"""The fingerprint of a model follows its content, every byte of it, and nothing else."""

import json
import os
import time
from pathlib import Path

import pytest

from harness.checkpoints import fingerprint
from harness.checkpoints.fingerprint import model_fingerprint, tokenizer_fingerprint
from harness.checkpoints.weight_files import INDEX
from harness.errors import WinnowError

SHARDS = {"model-1.safetensors": bytes(range(256)) * 64, "model-2.safetensors": bytes(1000)}


def checkpoint(folder: Path) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    for name, content in SHARDS.items():
        (folder / name).write_bytes(content)
    weight_map = {"a": "model-1.safetensors", "b": "model-2.safetensors"}
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return folder


@pytest.fixture(params=[2**30, 0], ids=["small", "large"])
def large(request, tmp_path, monkeypatch) -> bool:
    """Whether the hashes of files are remembered."""
    monkeypatch.setattr(fingerprint, "_LARGE", request.param)
    monkeypatch.setattr(fingerprint, "_CHUNK_BYTES", 100)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return request.param == 0


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(bytes(content))


def aged(folder: Path) -> None:
    """As if nothing had been touched for an hour."""
    for path in folder.iterdir():
        os.utime(path, (time.time() - 3600,) * 2)


@pytest.mark.parametrize("place", [0, 9999, -1])
@pytest.mark.parametrize("name", ["config.json", INDEX, *SHARDS])
def test_every_byte_counts(tmp_path, large, name, place):
    folder = checkpoint(tmp_path / "model")
    first = model_fingerprint(folder)
    assert first.startswith("sha256:")
    assert first == model_fingerprint(checkpoint(tmp_path / "copy"))
    place = min(place, len((folder / name).read_bytes()) - 1)
    if name == INDEX:
        (folder / INDEX).write_text((folder / INDEX).read_text() + " ")
    else:
        flip(folder / name, place)
    assert model_fingerprint(folder) != first


@pytest.mark.parametrize("stray", ["consolidated.safetensors", "model.safetensors", "original.bin", "README.md"])
def test_a_file_that_no_loader_reads_changes_nothing(tmp_path, large, stray):
    folder = checkpoint(tmp_path / "model")
    first = model_fingerprint(folder)
    (folder / stray).write_bytes(b"another")
    assert model_fingerprint(folder) == first


def test_a_large_file_is_read_once(tmp_path, monkeypatch):
    monkeypatch.setattr(fingerprint, "_LARGE", 0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(fingerprint, "_CLOCK", -1.0)  # files of just now are trusted
    folder = checkpoint(tmp_path / "model")
    first = model_fingerprint(folder)
    monkeypatch.setattr(fingerprint, "_sha256", lambda path: pytest.fail(f"{path} is read again"))
    assert model_fingerprint(folder) == first


def test_an_edit_in_place_within_the_clocks_resolution_is_seen(tmp_path, monkeypatch):
    """The same size, and times set back: only what was hashed long after its last change is trusted."""
    monkeypatch.setattr(fingerprint, "_LARGE", 0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = checkpoint(tmp_path / "model")
    shard = folder / "model-1.safetensors"
    first, times = model_fingerprint(folder), shard.stat()
    flip(shard, 5)
    os.utime(shard, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert model_fingerprint(folder) != first


def test_times_that_are_set_back_do_not_deceive(tmp_path, monkeypatch):
    """Whoever sets the time of the content back changes that of the file's description."""
    monkeypatch.setattr(fingerprint, "_LARGE", 0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(fingerprint, "_CLOCK", -1.0)
    folder = checkpoint(tmp_path / "model")
    aged(folder)
    first = model_fingerprint(folder)
    shard = folder / "model-1.safetensors"
    times = shard.stat()
    time.sleep(0.02)
    flip(shard, 5)
    os.utime(shard, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert model_fingerprint(folder) != first


def test_a_damaged_memory_is_no_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(fingerprint, "_LARGE", 0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = checkpoint(tmp_path / "model")
    first = model_fingerprint(folder)
    (tmp_path / "cache" / "winnow").mkdir(parents=True, exist_ok=True)
    for content in ("[", "[]", '{"x": 1}'):
        (tmp_path / "cache" / "winnow" / "hashes.json").write_text(content)
        assert model_fingerprint(folder) == first


def test_the_tokenizer_has_a_fingerprint_of_its_own(tmp_path):
    folder = checkpoint(tmp_path / "model")
    (folder / "tokenizer.json").write_text("{}")
    first, weights = tokenizer_fingerprint(folder), model_fingerprint(folder)
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json", "tokenizer_config.json"):
        before = tokenizer_fingerprint(folder)
        (folder / name).write_text("changed")
        assert tokenizer_fingerprint(folder) not in (before, first)
    assert model_fingerprint(folder) == weights


def test_model_without_weights_says_so(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(WinnowError, match="no weights in"):
        model_fingerprint(tmp_path)
    (tmp_path / "a.safetensors").write_bytes(b"1")
    (tmp_path / "b.safetensors").write_bytes(b"1")
    with pytest.raises(WinnowError, match="a.safetensors and b.safetensors and no"):
        model_fingerprint(tmp_path)
