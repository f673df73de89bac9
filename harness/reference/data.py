"""What the reference MoE is trained on: the tokenizer, and batches of packed documents."""

import random
from dataclasses import dataclass
from itertools import islice

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from harness.reference.recipe import Recipe
from tasks.reference.corpus import training_documents

# A space goes with the letter run, symbol run or single digit that follows it; a line break with its indentation.
WORDS = r"\n[ ]*| ?\d| ?\p{L}[\p{L}_]*| ?[^\s\p{L}\d]+|\s+"


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
    """``weights``: the loss weight of predicting each token of ``ids``; a document's first token is never predicted."""

    ids: list[int]
    weights: list[float]
    domain: int


def chunk_rows(tokenizer: PreTrainedTokenizerFast, recipe: Recipe, chunk: int) -> list[list[Document]]:
    """About ``chunk_tokens`` tokens of fresh documents in the recipe's shares, packed into rows of ``max_length``."""
    documents: list[Document] = []
    joint = tokenizer("\n", add_special_tokens=False)["input_ids"]
    for domain, (name, share) in enumerate(recipe.shares):
        seen = 0
        stream = training_documents(name, recipe.seed + 1 + chunk)
        shots = random.Random(f"shots-{recipe.seed}-{chunk}-{name}")
        while seen < share * recipe.chunk_tokens:
            pairs = list(islice(stream, 256))
            prompts = tokenizer([p for p, _ in pairs], add_special_tokens=False)["input_ids"]
            answers = tokenizer([a for _, a in pairs], add_special_tokens=False)["input_ids"]
            problems = list(zip(prompts, answers, strict=True))
            while problems:
                taken = 1 + (shots.randint(0, recipe.shots) if recipe.shots and prompts[0] else 0)
                documents.append(document_of(problems[:taken], domain, recipe, joint, tokenizer.eos_token_id))
                del problems[:taken]
                seen += len(documents[-1].ids)
    rng = random.Random(f"rows-{recipe.seed}-{chunk}")
    rng.shuffle(documents)
    rows = [row for i in range(0, len(documents), 400) for row in pack(documents[i : i + 400], recipe.max_length)]
    rng.shuffle(rows)
    return rows


def document_of(
    problems: list[tuple[list[int], list[int]]], domain: int, recipe: Recipe, joint: list[int], end: int
) -> Document:
    """The last problem (prompt ids, answer ids) with its end-of-text, behind the others as solved examples.

    Examples are dropped from the front until all fits into a row. Every answer has weight 1 and every prompt the
    recipe's; what joins an example to the next problem has none: only end-of-text is learned to follow an answer.
    """
    problems = list(problems)
    while len(problems) > 1 and sum(len(p) + len(a) + len(joint) for p, a in problems) > recipe.max_length:
        del problems[0]
    ids: list[int] = []
    weights: list[float] = []
    for prompt, answer in problems:
        between = joint if ids else []
        ids += between + prompt + answer
        weights += [0.0] * len(between) + [recipe.prompt_weight] * len(prompt) + [1.0] * len(answer)
    ids, weights = (ids + [end])[: recipe.max_length], (weights + [1.0])[: recipe.max_length]
    return Document(ids, weights, domain)


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
            batch.weights[r, start + 1 : start + size] = torch.tensor(document.weights[1:])
            start += size
    return batch


def attention_mask(segments: torch.Tensor) -> torch.Tensor:
    """(B, 1, S, S) boolean: a token sees itself and the earlier tokens of its own document."""
    same = segments[:, :, None] == segments[:, None, :]
    return (same & torch.ones(same.shape[1:], dtype=torch.bool).tril())[:, None]
