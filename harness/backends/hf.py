"""The transformers backend: generation with a key-value cache, and log-likelihoods, in batches.

Requests are sorted by length, so that a batch pads little, and answered in the order given. No special tokens
are added to any text. All is deterministic; the batch a request falls into changes its result by rounding.
"""

import copy
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor
from tqdm import tqdm
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from harness.backends import LogLikelihood, Sampling, TokenLogprobs, timed
from harness.backends.tokens import (
    Request,
    cut,
    decode,
    encode,
    prompts_that_fit,
    scoring_requests,
    stops_by_prompt,
    windows,
)
from harness.errors import WinnowError
from harness.loading import load_model, load_tokenizer

# Finished sequences leave the batch once they are this share of it: each departure copies the cache.
COMPACT_SHARE = 0.25
# At most this many logits at once (256 MB in float32): a batch shrinks where the vocabulary is large.
LOGIT_BUDGET = 2**26
# Scored tokens in a batch on a CPU: what they need then stays in its caches and in memory that is reused.
CPU_TOKENS = 1024


class StopStrings:
    """Tells cheaply whether a growing answer has come to contain one of the stop strings."""

    def __init__(self, tokenizer: Any, stop: Sequence[str]) -> None:
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


class HFBackend:
    """Decoding and scoring with a causal language model of transformers.

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
        self.seconds = {"generate": 0.0, "score": 0.0}
        self.facts: dict[str, Any] = {"version": transformers.__version__}
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

    def close(self) -> None:
        """Free the model."""
        del self.model

    def generate(
        self,
        prompts: Sequence[str],
        max_new_tokens: int,
        stop: Sequence[str] | Sequence[Sequence[str]] = (),
        sampling: Sampling | None = None,
        progress: str = "",
    ) -> list[str]:
        """Continuations of at most ``max_new_tokens`` tokens, cut before a stop string or end of text.

        Greedy where ``sampling`` is None. A prompt that leaves no room for them is cut on the left.
        """
        encoded = prompts_that_fit(self.tokenizer, prompts, max_new_tokens, self.max_length)
        stops = stops_by_prompt(stop, len(prompts))
        watches = {texts: StopStrings(self.tokenizer, texts) for texts in set(stops)}
        answers = [""] * len(encoded)
        order = sorted(range(len(encoded)), key=lambda i: -len(encoded[i]))
        with (
            timed(self.seconds, "generate"),
            tqdm(total=len(order), desc=progress, disable=not progress, leave=False) as bar,
        ):
            for start in range(0, len(order), self.batch_size):
                batch = order[start : start + self.batch_size]
                choice = Choice(sampling, batch)
                watching = [watches[stops[i]] for i in batch]
                written = self._continue([encoded[i] for i in batch], max_new_tokens, watching, choice, bar)
                for i, tokens in zip(batch, written, strict=True):
                    answers[i] = cut(decode(self.tokenizer, encoded[i], tokens), stops[i])
        return answers

    def loglikelihood(self, pairs: Sequence[tuple[str, str]], progress: str = "") -> list[LogLikelihood]:
        """The log-likelihood of each continuation, tokenized together with its context (``tokens.scoring_requests``).

        Continuations of one context share its forward pass.
        """
        groups: dict[tuple[int, ...], list[Request]] = defaultdict(list)
        for request in scoring_requests(self.tokenizer, pairs, self.max_length + 1):
            groups[request.context].append(request)
        results = [LogLikelihood(0.0, 0)] * len(pairs)
        with self._work("score", len(pairs), progress) as bar, torch.inference_mode():
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
        parts = [
            (i, part)
            for i, tokens in enumerate(encode(self.tokenizer, texts))
            for part in windows(tokens, self.max_length)
        ]
        logprobs, counts = [0.0] * len(texts), [0] * len(texts)
        with (
            timed(self.seconds, "score"),
            tqdm(total=len(parts), desc=progress, disable=not progress, leave=False) as bar,
        ):
            for batch, logits in self._forward_all([part for _, part in parts]):
                for place, logprob in zip(batch, _gather(logits, [parts[k][1][1:] for k in batch]), strict=True):
                    logprobs[parts[place][0]] += float(logprob.double().sum())
                    counts[parts[place][0]] += len(logprob)
                bar.update(len(batch))
        return [LogLikelihood(*both) for both in zip(logprobs, counts, strict=True)]

    def token_logprobs(self, texts: Sequence[str], top: int, progress: str = "") -> list[TokenLogprobs]:
        """For every token of each text but the first: its log-probability, and the ``top`` likeliest tokens instead.

        Raises WinnowError for a text that is longer than the model's length.
        """
        encoded = encode(self.tokenizer, texts)
        longest = max(map(len, encoded), default=0)
        if longest > self.max_length + 1 or not 1 <= top <= self._vocabulary:
            raise WinnowError(
                f"top={top}, longest text of {longest} tokens: needs 1 to {self._vocabulary} and at most "
                f"{self.max_length + 1}"
            )
        results: list[TokenLogprobs] = [TokenLogprobs.empty(tokens, top) for tokens in encoded]
        scored = [i for i, tokens in enumerate(encoded) if len(tokens) > 1]
        with (
            timed(self.seconds, "score"),
            tqdm(total=len(scored), desc=progress, disable=not progress, leave=False) as bar,
        ):
            for batch, logits in self._forward_all([encoded[i] for i in scored]):
                for row, place in enumerate(batch):
                    tokens = encoded[scored[place]]
                    logprobs = logits[row, : len(tokens) - 1].float().log_softmax(-1)
                    best = logprobs.topk(top, dim=-1)
                    own = logprobs[torch.arange(len(tokens) - 1), tokens[1:]]
                    results[scored[place]] = TokenLogprobs(
                        np.array(tokens[1:]),
                        own.cpu().numpy(),
                        best.indices.cpu().numpy(),
                        best.values.cpu().numpy(),
                    )
                bar.update(len(batch))
        return results

    @contextmanager
    def _work(self, what: str, total: int, progress: str) -> Iterator[Any]:
        """A progress bar over ``total`` requests, whose time counts as ``what``."""
        with timed(self.seconds, what), tqdm(total=total, desc=progress, disable=not progress, leave=False) as bar:
            yield bar

    # Batches

    def _positions(self) -> int:
        by_logits = max(1, LOGIT_BUDGET // self._vocabulary)
        return min(by_logits, CPU_TOKENS) if self.model.device.type == "cpu" else by_logits

    def _forward_all(self, sequences: Sequence[list[int]]) -> Iterator[tuple[list[int], Tensor]]:
        """Batches of sequences, longest first, each without its last token: (their places, logits [n, width, V])."""
        order = sorted(range(len(sequences)), key=lambda i: -len(sequences[i]))
        with torch.inference_mode():
            while order:
                rows = max(1, min(self.batch_size, self._positions() // len(sequences[order[0]])))
                batch, order = order[:rows], order[rows:]
                # Padding on the right and causal attention: no token sees any, so no mask is needed.
                inputs, _ = self._pad_right([sequences[i][:-1] for i in batch])
                yield batch, self.model(input_ids=inputs, use_cache=False).logits

    def _group_batches(self, groups: dict[tuple[int, ...], list[Request]]) -> Iterator[list[list[Request]]]:
        """Groups of one context each, longest first, with at most ``batch_size`` requests together."""
        batch: list[list[Request]] = []
        size = 0
        for context in sorted(groups, key=lambda context: (-len(context), context)):
            for start in range(0, len(groups[context]), self.batch_size):
                group = groups[context][start : start + self.batch_size]
                width = len(batch[0][0].context) if batch else 0
                if batch and (size + len(group) > self.batch_size or (len(batch) + 1) * width > self._positions()):
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
        cache.layers = [RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        return cache, mask, self._forward(ids, mask, positions, cache, last=True)[:, -1]

    @torch.inference_mode()
    def _continue(
        self, prompts: list[list[int]], max_new: int, stops: list[StopStrings], choice: "Choice", bar: Any
    ) -> list[list[int]]:
        """The tokens that are added to each prompt, without end-of-text tokens."""
        cache, prompt_mask, logits = self._start(prompts)
        width = prompt_mask.shape[1]
        mask = torch.cat([prompt_mask, prompt_mask.new_ones(len(prompts), max_new)], dim=1)
        positions = self._tensor([[len(prompt)] for prompt in prompts])
        written: list[list[int]] = [[] for _ in prompts]
        rows, running = list(range(len(prompts))), [True] * len(prompts)
        for step in range(1, max_new + 1):
            chosen = choice(logits, rows)
            for i, token in enumerate(chosen.tolist()):
                if not running[i]:
                    continue
                answer = written[rows[i]]
                if token not in self._end:
                    answer.append(token)
                if token in self._end or step == max_new or stops[rows[i]].reached(answer):
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

    def _score(self, groups: list[list[Request]]) -> Iterator[tuple[Request, float]]:
        """Score the continuations of a batch of contexts: the contexts once, then what follows each."""
        contexts = [group[0].context for group in groups]
        cache, mask, last = self._start(contexts)
        first = last.float().log_softmax(-1)
        rest: list[tuple[int, Request]] = []
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


class Choice:
    """The next token of each sequence of a batch: the likeliest, or a draw with a stream of numbers of its own.

    A draw depends on the seed and on the place of the prompt among the prompts, not on its batch.
    """

    def __init__(self, sampling: Sampling | None, places: Sequence[int]) -> None:
        self._sampling = sampling
        if sampling is not None:
            self._streams = [np.random.default_rng([sampling.seed, place]) for place in places]

    def __call__(self, logits: Tensor, rows: Sequence[int]) -> Tensor:
        """(n,) tokens for ``logits`` (n, V) of the sequences ``rows`` of the batch."""
        if self._sampling is None:
            return logits.argmax(-1)
        ordered, tokens = (logits.float() / self._sampling.temperature).softmax(-1).sort(-1, descending=True)
        before = ordered.cumsum(-1) - ordered  # a token stays while those before it hold less than top_p
        kept = ordered.masked_fill(before >= self._sampling.top_p, 0.0).cumsum(-1)
        draws = torch.tensor([self._streams[row].random() for row in rows], device=logits.device)
        places = torch.searchsorted(kept, (draws * kept[:, -1])[:, None], right=True).clamp(max=kept.shape[-1] - 1)
        return tokens.gather(-1, places)[:, 0]


class RoomyLayer(DynamicLayer):
    """Keys and values with room for more tokens behind them, so that a new token is written and the old not copied."""

    ROOM = 64  # tokens
    _room: tuple[Tensor, ...] = ()  # the tensors that ``keys`` and ``values`` are the beginnings of

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        new = (key_states, value_states)
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        if start == 0:
            self.lazy_initialization(key_states, value_states)
            self._room = ()
        if not self._room or end > self._room[0].shape[-2]:
            grown = tuple(part.new_empty(*part.shape[:2], end + self.ROOM, part.shape[-1]) for part in new)
            if start and self.keys is not None and self.values is not None:
                grown[0][:, :, :start], grown[1][:, :, :start] = self.keys, self.values
            self._room = grown
        for room, part in zip(self._room, new, strict=True):
            room[:, :, start:end] = part
        self.keys, self.values = (room[:, :, :end] for room in self._room)
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._room = ()


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
