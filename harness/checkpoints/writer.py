"""Write a checkpoint folder: its shards one after the other, and all of it or nothing."""

import json
import os
import shutil
import socket
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from harness import progress
from harness.checkpoints.weight_files import INDEX, WEIGHTS
from harness.errors import WinnowError
from harness.files import is_full

WITH_ARRAYS = "plan"  # folder for a plan with arrays: engines take every safetensors file beside the weights for more
COPIED = (
    "generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*",
    "merges.txt", "*.model", "*.tiktoken", "*.py", "chat_template*", "LICENSE*", "NOTICE*",
)  # fmt: skip


@dataclass(frozen=True)
class Output:
    """One tensor to write. Two of the same ``content`` in a shard are made once."""

    name: str
    content: Hashable
    make: Callable[[], torch.Tensor]


def copy_companions(source: Path, folder: Path) -> None:
    """Copy what lies beside the weights and does not depend on them, such as the tokenizer."""
    for path in sorted({path for pattern in COPIED for path in source.glob(pattern) if path.is_file()}):
        shutil.copyfile(path, folder / path.name)


def write_shards(
    folder: Path,
    shards: list[list[Output]],
    what: str = "writing checkpoint",
    written: Callable[[], object] = lambda: None,
) -> None:
    """One file a shard, and an index where there are several. ``folder`` has its config.json already, whose
    permissions they take. ``what`` stands before the progress bar; "" for none. ``written`` is called when nothing of
    a shard is held any more."""
    names = [WEIGHTS]
    if len(shards) > 1:
        names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    weight_map: dict[str, str] = {}
    total_bytes = total_parameters = 0
    with progress.bar(what, sum(map(len, shards))) as bar:
        for file_name, shard in zip(names, shards, strict=True):
            tensors: dict[str, torch.Tensor] = {}
            made: dict[Hashable, torch.Tensor] = {}
            for output in shard:
                if output.content in made:  # safetensors refuses two names for one storage
                    tensors[output.name] = made[output.content].clone()
                else:
                    tensors[output.name] = made[output.content] = output.make().contiguous()
                bar.update()
            save_file(tensors, folder / file_name, metadata={"format": "pt"})
            shutil.copymode(folder / "config.json", folder / file_name)  # save_file lets only the owner read
            weight_map |= dict.fromkeys(tensors, file_name)
            total_bytes += sum(tensor.nbytes for tensor in tensors.values())
            total_parameters += sum(tensor.numel() for tensor in tensors.values())
            del tensors, made
            written()
    if len(shards) > 1:
        metadata = {"total_parameters": total_parameters, "total_size": total_bytes}
        index = {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


@contextmanager
def written_atomically(target: Path) -> Iterator[Path]:
    """An empty folder beside ``target`` that takes its place on success and is removed on any error."""
    target = target.absolute()
    if target.exists() and not (target / "config.json").is_file() and not _is_empty_folder(target):
        raise WinnowError(f"{target} exists and is not a checkpoint: remove it or choose another folder")
    own = f"{socket.gethostname()}-{os.getpid()}"
    partial, replaced = (target.with_name(f".{target.name}.{own}.{end}") for end in ("partial", "replaced"))
    try:
        _remove_leftovers(target)
        partial.mkdir(parents=True)
        yield partial
        if target.exists():
            target.rename(replaced)
        try:
            partial.rename(target)
        except OSError:
            if replaced.exists():
                replaced.rename(target)
            raise
        shutil.rmtree(replaced, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        if is_full(error) or "os error 28" in str(error):
            advice = f"no space left for {target}: free some or choose another folder; nothing was written"
            raise WinnowError(advice) from error
        raise WinnowError(f"cannot write {target} ({error}): choose a folder that can be written") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _is_empty_folder(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())


def _remove_leftovers(target: Path) -> None:
    """Remove what killed processes of this machine left half-written beside ``target``."""
    prefix = f".{target.name}.{socket.gethostname()}-"
    for path in target.parent.glob(f"{prefix}*"):
        pid, _, end = path.name.removeprefix(prefix).partition(".")
        if end in ("partial", "replaced") and pid.isdigit() and not _runs_elsewhere(int(pid)):
            shutil.rmtree(path, ignore_errors=True)


def _runs_elsewhere(pid: int) -> bool:
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
