"""The tokenizer of a checkpoint, made from its files; no code of a checkpoint is run."""

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from harness.checkpoints.hub import resolve_checkpoint
from harness.checkpoints.tiktoken import VOCABULARY, code_file, read_tokenizer
from harness.errors import WinnowError, first_line

_VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "*.model", "*.tiktoken")


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
        raise WinnowError(f"no usable tokenizer in {folder}: {first_line(error)}") from error
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
        reason = f"{code} is not run, as no code of a checkpoint is, and without it: {first_line(error)}"
        raise WinnowError(reason) from error
