"""Tokenizers that are published as a tiktoken vocabulary and Python code, such as Kimi-K2's. The code is never run.

transformers reads the vocabulary, the special tokens and the chat template, but splits texts as GPT-4 does. The
pattern that they have to be split by is a constant of the code, ``pat_str``, and is read from its source.
"""

import ast
import json
from pathlib import Path

from tokenizers import Regex, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from harness.errors import WinnowError

VOCABULARY, _PATTERN = "tiktoken.model", "pat_str"


def code_file(folder: Path) -> str:
    """The Python file that a checkpoint's tokenizer comes with, as tokenizer_config.json says; "" where it has none."""
    path = folder / "tokenizer_config.json"
    classes = json.loads(path.read_text()).get("auto_map") if path.is_file() else None
    if isinstance(classes, dict):
        classes = classes.get("AutoTokenizer")
    names = [classes] if isinstance(classes, str) else classes or []
    return next((f"{name.split('--')[-1].split('.')[0]}.py" for name in reversed(names) if name), "")


def read_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a folder with ``tiktoken.model``, as a fast one; made of tokenizer.json where there is one.

    Raises ValueError where the package tiktoken is missing, and WinnowError where the code has no pattern.
    """
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    if not (folder / "tokenizer.json").is_file():
        split = pre_tokenizers.Split(Regex(split_pattern(folder / code_file(folder))), behavior="isolated")
        to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    return tokenizer


def split_pattern(code: Path) -> str:
    """The value of ``pat_str`` in a source file: a string, or strings joined by one."""
    if code.is_file():
        for node in ast.walk(ast.parse(code.read_text())):
            if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == _PATTERN for t in node.targets):
                match node.value:
                    case ast.Call(
                        func=ast.Attribute(value=ast.Constant(value=str(between)), attr="join"), args=[parts]
                    ):
                        return between.join(ast.literal_eval(parts))
                    case ast.Constant(value=str(pattern)):
                        return pattern
    raise WinnowError(f"{code.name} says no {_PATTERN} to split texts by, as {VOCABULARY} needs: add a tokenizer.json")
