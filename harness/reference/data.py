"""What the reference MoE is trained on: the recipe's numbers, the tokenizer, and batches of packed documents."""

import random
from dataclasses import dataclass
from itertools import islice

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tasks.reference.corpus import training_documents

# A space goes with the letter run, symbol run or single digit that follows it; a line break with its indentation.
WORDS = r"\n[ ]*| ?\d| ?\p{L}[\p{L}_]*| ?[^\s\p{L}\d]+|\s+"


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what the model becomes."""

    vocab_size: int = 2048
    hidden_size: int = 128
    num_layers: int = 6
    dense_layers: tuple[int, ...] = (0, 1, 3, 5)
    dense_width: int = 512
    num_experts: int = 128
    top_k: int = 8
    expert_width: int = 32
    balance: float = 1e-4
    tokens: int = 7_000_000
    step_tokens: int = 4096
    max_length: int = 320
    learning_rate: float = 2e-3
    warmup: float = 0.02
    decay: float = 0.3
    weight_decay: float = 0.1
    prompt_weight: float = 0.25
    shares: tuple[tuple[str, float], ...] = (
        ("code", 0.22), ("math", 0.36), ("writing", 0.14), ("knowledge", 0.14), ("real_text", 0.14),
    )  # fmt: skip
    chunk_tokens: int = 500_000
    tokenizer_documents: int = 4_000
    seed: int = 0

    @property
    def moe_layers(self) -> int:
        return self.num_layers - len(self.dense_layers)


def train_tokenizer(recipe: Recipe) -> PreTrainedTokenizerFast:
    """Byte-level BPE whose numbers are written digit by digit, learned on a sample of every domain."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    sample = [
        prompt + answer
        for domain, share in recipe.shares
        for prompt, answer in islice(
            training_documents(domain, recipe.seed), int(recipe.tokenizer_documents * (0.5 + share))
        )
    ]
    tokenizer.train_from_iterator(
        sample,
        trainers.BpeTrainer(
            vocab_size=recipe.vocab_size,
            special_tokens=["<|endoftext|>", "<|pad|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|endoftext|>",
        pad_token="<|pad|>",
        clean_up_tokenization_spaces=False,
    )


@dataclass(frozen=True)
class Document:
    ids: list[int]
    prompt_length: int
    domain: int


def chunk_rows(tokenizer: PreTrainedTokenizerFast, recipe: Recipe, chunk: int) -> list[list[Document]]:
    """About ``chunk_tokens`` tokens of fresh documents in the recipe's shares, packed into rows of ``max_length``."""
    documents: list[Document] = []
    for domain, (name, share) in enumerate(recipe.shares):
        seen = 0
        stream = training_documents(name, recipe.seed + 1 + chunk)
        while seen < share * recipe.chunk_tokens:
            pairs = list(islice(stream, 256))
            prompts = tokenizer([p for p, _ in pairs], add_special_tokens=False)["input_ids"]
            answers = tokenizer([a for _, a in pairs], add_special_tokens=False)["input_ids"]
            for prompt, answer in zip(prompts, answers, strict=True):
                ids = (prompt + answer + [tokenizer.eos_token_id])[: recipe.max_length]
                documents.append(Document(ids, min(len(prompt), len(ids)), domain))
                seen += len(ids)
    rng = random.Random(f"rows-{recipe.seed}-{chunk}")
    rng.shuffle(documents)
    rows = [row for i in range(0, len(documents), 400) for row in pack(documents[i : i + 400], recipe.max_length)]
    rng.shuffle(rows)
    return rows


def pack(documents: list[Document], length: int) -> list[list[Document]]:
    """First-fit decreasing: rows of whole documents, each row at most ``length`` tokens."""
    rows: list[list[Document]] = []
    free: list[int] = []
    for document in sorted(documents, key=lambda d: -len(d.ids)):
        size = len(document.ids)
        row = next((i for i, room in enumerate(free) if room >= size), None)
        if row is None:
            rows.append([])
            free.append(length)
            row = len(rows) - 1
        rows[row].append(document)
        free[row] -= size
    return rows


@dataclass(frozen=True)
class Batch:
    """``weights`` is the loss weight of predicting the token at its place, 0 for first tokens and padding."""

    ids: torch.Tensor
    positions: torch.Tensor
    segments: torch.Tensor
    weights: torch.Tensor
    domains: torch.Tensor


def collate(rows: list[list[Document]], recipe: Recipe, pad: int) -> Batch:
    shape = (len(rows), recipe.max_length)
    batch = Batch(
        torch.full(shape, pad), torch.zeros(shape, dtype=torch.long), torch.full(shape, -1), torch.zeros(shape),
        torch.zeros(shape, dtype=torch.long),
    )  # fmt: skip
    for r, row in enumerate(rows):
        start = 0
        for number, document in enumerate(row):
            size = len(document.ids)
            place = (r, slice(start, start + size))
            batch.ids[place] = torch.tensor(document.ids)
            batch.positions[place] = torch.arange(size)
            batch.segments[place] = number
            batch.domains[place] = document.domain
            batch.weights[r, start + 1 : start + size] = 1.0
            batch.weights[r, start + 1 : start + document.prompt_length] = recipe.prompt_weight
            start += size
    return batch


def attention_mask(segments: torch.Tensor) -> torch.Tensor:
    """(B, 1, S, S) boolean: a token sees itself and the earlier tokens of its own document."""
    same = segments[:, :, None] == segments[:, None, :]
    return (same & torch.ones(same.shape[1:], dtype=torch.bool).tril())[:, None]
