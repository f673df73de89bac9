"""The transformers backend: greedy generation with a key-value cache, and log-likelihoods, in batches.

Requests are sorted by length, so that a batch pads little, and answered in the order given. No special tokens
are added to any text. All is deterministic; the batch a request falls into changes its result by rounding.
"""

import copy
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import DynamicCache, PreTrainedModel

from harness.backends import LogLikelihood
from harness.errors import WinnowError
from harness.loading import load_model, load_tokenizer

# Finished sequences leave the batch once they are this share of it: each departure copies the cache.
COMPACT_SHARE = 0.25
# At most this many logits at once (256 MB in float32): a batch shrinks where the vocabulary is large.
LOGIT_BUDGET = 2**26
# Prompt tokens decoded along with an answer, because some tokenizers drop the space that begins a text.
DECODE_CONTEXT = 8


@dataclass(frozen=True)
class _Request:
    """A continuation to score: its place in the answer, the tokens before it, and its own."""

    index: int
    context: tuple[int, ...]
    continuation: list[int]


class StopStrings:
    """Tells cheaply whether a growing answer has come to contain one of the stop strings."""

    def __init__(self, tokenizer: Any, stop: Sequence[str]) -> None:
        if "" in stop:
            raise WinnowError("an empty stop string would end every answer at once: leave it out")
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._last = {text[-1] for text in stop}
        # A token is at least a byte of UTF-8, and a stop string may begin inside of one.
        self._tail = max((len(text.encode()) for text in stop), default=0) + 1
        self._may_end: dict[int, bool] = {}

    def _can_complete(self, token: int) -> bool:
        """Whether a stop string may end in this token: it holds the last character of one, or part of any.

        Some tokenizers drop the space that begins a token, so where a stop string ends in one, any token may.
        """
        if token not in self._may_end:
            text = self._tokenizer.decode([token], clean_up_tokenization_spaces=False)
            unclear = "\ufffd" in text or " " in self._last
            self._may_end[token] = unclear or not self._last.isdisjoint(text)
        return self._may_end[token]

    def reached(self, tokens: Sequence[int]) -> bool:
        """Whether the newest of ``tokens`` completes a stop string."""
        if not self._stop or not self._can_complete(tokens[-1]):
            return False
        text = self._tokenizer.decode(list(tokens[-self._tail :]), clean_up_tokenization_spaces=False)
        return any(stop in text for stop in self._stop)

    def cut(self, text: str) -> str:
        """``text`` up to the first stop string in it."""
        ends = [text.find(stop) for stop in self._stop if stop in text]
        return text[: min(ends)] if ends else text


class HFBackend:
    """Greedy decoding and scoring with a causal language model of transformers.

    ``batch_size`` is the number of sequences in a batch; ``max_length`` the longest sequence in tokens
    (default: the model's own). Raises WinnowError where a request does not fit into it.
    """

    name = "hf"

    def __init__(
        self, model: PreTrainedModel, tokenizer: Any, batch_size: int = 128, max_length: int | None = None
    ) -> None:
        if batch_size < 1 or (max_length is not None and max_length < 2):
            raise WinnowError(f"batch_size={batch_size}, max_length={max_length}: needs at least 1 and 2")
        self.model, self.tokenizer, self.batch_size = model.eval(), tokenizer, batch_size
        config = model.config.get_text_config()
        self.max_length: int = max_length or getattr(config, "max_position_embeddings", None) or 2048
        self._vocabulary: int = config.vocab_size
        ends = (
            tokenizer.eos_token_id,
            config.eos_token_id,
            getattr(model.generation_config, "eos_token_id", None),
        )
        lists = (end if isinstance(end, (list, tuple)) else [end] for end in ends)
        self._end = {token for tokens in lists for token in tokens if token is not None}
        self._pad: int = next(
            (token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id) if token is not None), 0
        )

    def generate(
        self, prompts: Sequence[str], max_new_tokens: int, stop: Sequence[str] = (), progress: str = ""
    ) -> list[str]:
        """Greedy continuations of at most ``max_new_tokens`` tokens, cut before a stop string or end of text.

        A prompt that leaves no room for them is cut on the left.
        """
        room = self.max_length - max_new_tokens
        if max_new_tokens < 1 or room < 1:
            raise WinnowError(
                f"max_new_tokens={max_new_tokens}: choose between 1 and {self.max_length - 1}, one less than "
                "the model's length"
            )
        encoded = [(tokens or [self._prefix()])[-room:] for tokens in self._encode(prompts)]
        stops = StopStrings(self.tokenizer, stop)
        answers = [""] * len(encoded)
        order = sorted(range(len(encoded)), key=lambda i: -len(encoded[i]))
        with tqdm(total=len(order), desc=progress, disable=not progress, leave=False) as bar:
            for start in range(0, len(order), self.batch_size):
                batch = order[start : start + self.batch_size]
                written = self._continue([encoded[i] for i in batch], max_new_tokens, stops, bar)
                for i, tokens in zip(batch, written, strict=True):
                    answers[i] = stops.cut(self._decode(encoded[i], tokens))
        return answers

    def loglikelihood(self, pairs: Sequence[tuple[str, str]], progress: str = "") -> list[LogLikelihood]:
        """The log-likelihood of each continuation, tokenized together with its context as lm-eval does.

        Spaces at the end of a context go to the continuation, and the tokens of both together are split where
        the tokens of the context alone end. An empty context is the beginning-of-text (or end-of-text) token.
        Continuations of one context share its forward pass.
        """
        groups: dict[tuple[int, ...], list[_Request]] = defaultdict(list)
        for request in self._requests(pairs):
            groups[request.context].append(request)
        results = [LogLikelihood(0.0, 0)] * len(pairs)
        with (
            tqdm(total=len(pairs), desc=progress, disable=not progress, leave=False) as bar,
            torch.inference_mode(),
        ):
            for batch in self._group_batches(groups):
                for request, logprob in self._score(batch):
                    results[request.index] = LogLikelihood(logprob, len(request.continuation))
                    bar.update()
        return results

    def loglikelihood_rolling(self, texts: Sequence[str], progress: str = "") -> list[LogLikelihood]:
        """The log-likelihood of every token of each text but the first.

        Windows of ``max_length`` tokens, of which each begins with the last token of the one before: every
        token is scored once. A text of fewer than two tokens gives 0.0 over 0 tokens.
        """
        windows: list[tuple[int, list[int]]] = []
        for i, tokens in enumerate(self._encode(texts)):
            starts = range(0, len(tokens) - 1, self.max_length)
            windows += [(i, tokens[start : start + self.max_length + 1]) for start in starts]
        windows.sort(key=lambda window: -len(window[1]))
        logprobs, counts = [0.0] * len(texts), [0] * len(texts)
        with (
            tqdm(total=len(windows), desc=progress, disable=not progress, leave=False) as bar,
            torch.inference_mode(),
        ):
            while windows:
                rows = max(1, min(self.batch_size, self._positions() // len(windows[0][1])))
                batch, windows = windows[:rows], windows[rows:]
                # Padding on the right and causal attention: no token sees any, so no mask is needed.
                inputs, _ = self._pad_right([tokens[:-1] for _, tokens in batch])
                logits = self.model(input_ids=inputs, use_cache=False).logits
                for (i, _), part in zip(batch, _gather(logits, [tokens[1:] for _, tokens in batch]), strict=True):
                    logprobs[i] += float(part.double().sum())
                    counts[i] += len(part)
                bar.update(len(batch))
        return [LogLikelihood(*both) for both in zip(logprobs, counts, strict=True)]

    # Tokens

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        if not texts:
            return []
        encoded: list[list[int]] = self.tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
        return encoded

    def _decode(self, prompt: list[int], tokens: list[int]) -> str:
        before = prompt[-DECODE_CONTEXT:]
        options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
        start: str = self.tokenizer.decode(before, **options)
        both: str = self.tokenizer.decode(before + tokens, **options)
        if both.startswith(start):
            return both[len(start) :]
        alone: str = self.tokenizer.decode(tokens, **options)
        return alone

    def _prefix(self) -> int:
        for token in (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id):
            if token is not None:
                return int(token)
        raise WinnowError("an empty context needs a beginning- or end-of-text token, and the tokenizer has neither")

    def _requests(self, pairs: Sequence[tuple[str, str]]) -> Iterator[_Request]:
        contexts = [context.rstrip() for context, _ in pairs]
        whole = self._encode([context + continuation for context, continuation in pairs])
        alone = dict(zip(set(contexts), self._encode(list(set(contexts))), strict=True))
        for i, (context, tokens) in enumerate(zip(contexts, whole, strict=True)):
            if len(pairs[i][0]) + len(pairs[i][1]) == len(context):
                raise WinnowError(f"request {i}: the continuation to score is empty")
            # A merge across the border may leave the context more tokens than both together have.
            split = min(len(alone[context]), len(tokens) - 1)
            before, continuation = tokens[:split] or [self._prefix()], tokens[split:]
            if len(continuation) > self.max_length:
                raise WinnowError(
                    f"request {i}: a continuation of {len(continuation)} tokens is longer than max_length="
                    f"{self.max_length}; raise max_length or shorten the text"
                )
            yield _Request(i, tuple(before[-(self.max_length + 1 - len(continuation)) :]), continuation)

    # Batches

    def _positions(self) -> int:
        return max(1, LOGIT_BUDGET // self._vocabulary)

    def _group_batches(self, groups: dict[tuple[int, ...], list[_Request]]) -> Iterator[list[list[_Request]]]:
        """Groups of one context each, longest first, with at most ``batch_size`` requests together."""
        batch: list[list[_Request]] = []
        size = 0
        for context in sorted(groups, key=lambda context: (-len(context), context)):
            for start in range(0, len(groups[context]), self.batch_size):
                group = groups[context][start : start + self.batch_size]
                if size + len(group) > self.batch_size:
                    yield batch
                    batch, size = [], 0
                batch.append(group)
                size += len(group)
        if batch:
            yield batch

    def _pad_left(self, sequences: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Token ids and attention mask, both [sequences, longest]."""
        width = max(map(len, sequences))
        ids = [[self._pad] * (width - len(s)) + list(s) for s in sequences]
        mask = [[0] * (width - len(s)) + [1] * len(s) for s in sequences]
        return self._tensor(ids), self._tensor(mask)

    def _pad_right(self, sequences: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        width = max(map(len, sequences))
        ids = [list(s) + [self._pad] * (width - len(s)) for s in sequences]
        mask = [[1] * len(s) + [0] * (width - len(s)) for s in sequences]
        return self._tensor(ids), self._tensor(mask)

    def _tensor(self, values: list[Any]) -> Tensor:
        return torch.tensor(values, device=self.model.device)

    # The model

    def _forward(self, ids: Tensor, mask: Tensor | None, positions: Tensor, cache: DynamicCache, last: bool) -> Tensor:
        logits: Tensor = self.model(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True,
            logits_to_keep=1 if last else 0,
        ).logits  # fmt: skip
        return logits

    def _start(self, sequences: Sequence[Sequence[int]]) -> tuple[DynamicCache, Tensor, Tensor]:
        """Run contexts padded on the left: the cache, the mask [n, width], last logits [n, vocabulary]."""
        ids, mask = self._pad_left(sequences)
        cache = DynamicCache(config=self.model.config)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        return cache, mask, self._forward(ids, mask, positions, cache, last=True)[:, -1]

    @torch.inference_mode()
    def _continue(self, prompts: list[list[int]], max_new: int, stops: StopStrings, bar: Any) -> list[list[int]]:
        """The tokens that greedy decoding adds to each prompt, without end-of-text tokens."""
        cache, prompt_mask, logits = self._start(prompts)
        width = prompt_mask.shape[1]
        mask = torch.cat([prompt_mask, prompt_mask.new_ones(len(prompts), max_new)], dim=1)
        positions = self._tensor([[len(prompt)] for prompt in prompts])
        written: list[list[int]] = [[] for _ in prompts]
        rows, running = list(range(len(prompts))), [True] * len(prompts)
        for step in range(1, max_new + 1):
            chosen = logits.argmax(-1)
            for i, token in enumerate(chosen.tolist()):
                if not running[i]:
                    continue
                answer = written[rows[i]]
                if token not in self._end:
                    answer.append(token)
                if token in self._end or step == max_new or stops.reached(answer):
                    running[i] = False
                    bar.update()
            active = sum(running)
            if not active:
                break
            if active <= (1 - COMPACT_SHARE) * len(rows):
                keep = self._tensor([i for i, goes_on in enumerate(running) if goes_on])
                cache.batch_select_indices(keep)
                chosen, mask, positions = chosen[keep], mask[keep], positions[keep]
                rows, running = [rows[i] for i in keep.tolist()], [True] * active
            logits = self._forward(chosen[:, None], mask[:, : width + step], positions, cache, last=True)[:, -1]
            positions = positions + 1
        return written

    def _score(self, groups: list[list[_Request]]) -> Iterator[tuple[_Request, float]]:
        """Score the continuations of a batch of contexts: the contexts once, then what follows each."""
        contexts = [group[0].context for group in groups]
        cache, mask, last = self._start(contexts)
        first = last.float().log_softmax(-1)
        rest: list[tuple[int, _Request]] = []
        scores: dict[int, float] = {}
        for row, group in enumerate(groups):
            for request in group:
                scores[request.index] = float(first[row, request.continuation[0]])
                if len(request.continuation) == 1:
                    yield request, scores[request.index]
                else:
                    rest.append((row, request))
        rest.sort(key=lambda pair: -len(pair[1].continuation))
        while rest:
            size = max(1, self._positions() // len(rest[0][1].continuation))
            part, rest = rest[:size], rest[size:]
            rows = self._tensor([row for row, _ in part])
            inputs, own_mask = self._pad_right([request.continuation[:-1] for _, request in part])
            starts = self._tensor([[len(request.context)] for _, request in part])
            positions = starts + torch.arange(inputs.shape[1], device=inputs.device)
            both = torch.cat([mask[rows], own_mask], dim=1)
            logits = self._forward(inputs, both, positions, _select(cache, rows), last=False)
            logprobs = _gather(logits, [request.continuation[1:] for _, request in part])
            for (_, request), logprob in zip(part, logprobs, strict=True):
                yield request, scores[request.index] + float(logprob.double().sum())


def _select(cache: DynamicCache, rows: Tensor) -> DynamicCache:
    """A cache that holds these rows of ``cache``, which stays as it is."""
    selected = copy.copy(cache)
    selected.layers = [copy.copy(layer) for layer in cache.layers]
    selected.batch_select_indices(rows)
    return selected


def _gather(logits: Tensor, targets: Sequence[Sequence[int]]) -> list[Tensor]:
    """The log-probability of each target token; row i of ``logits`` [n, width, vocabulary] is for row i."""
    return [
        row[: len(target)].float().log_softmax(-1)[torch.arange(len(target)), list(target)]
        for row, target in zip(logits, targets, strict=True)
    ]


def open_checkpoint(folder: str, dtype: str, device: Any, batch_size: int, max_length: int | None) -> HFBackend:
    """The backend of ``backend=hf``: the model and tokenizer in ``folder``. Raises WinnowError as they do."""
    return HFBackend(load_model(folder, dtype, device), load_tokenizer(folder), batch_size, max_length)
