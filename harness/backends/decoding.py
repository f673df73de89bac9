"""What decoding with transformers needs beside the model: batches, when to stop, what to choose, a growing cache."""

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, LinearAttentionCacheLayerMixin

from harness.contracts.backend import Sampling

# Generation: tokens that the cache of a batch has room for, and tokens that pad its prompts to the longest.
CACHED_TOKENS = 2**17
PADDING = 2**12


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

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)  # type: ignore[arg-type]
        self._room = ()


def roomy_cache(config: Any) -> DynamicCache:
    """An empty cache for a model of this config, whose plain layers are ``RoomyLayer``."""
    cache = DynamicCache(config=config)
    cache.layers = [RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def can_select_rows(config: Any) -> bool:
    """Whether several texts may go on from one context: the states of linear layers are not made for it."""
    return not any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in roomy_cache(config).layers)


def select_rows(cache: DynamicCache, rows: Tensor) -> DynamicCache:
    """A cache that holds these rows of ``cache``, which stays as it is; layers may be on several devices."""
    selected = copy.copy(cache)
    selected.layers = [copy.copy(layer) for layer in cache.layers]
    selected.reorder_cache(rows)  # type: ignore[arg-type]
    return selected


def prompt_batches(lengths: Sequence[int], max_new_tokens: int, batch_size: int) -> Iterator[list[int]]:
    """Places of prompts of these lengths, the longest first, in batches of at most ``batch_size``: fewer where they
    would need more than CACHED_TOKENS or PADDING."""
    batch: list[int] = []
    padding = 0
    for place in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        longest = lengths[batch[0]] if batch else lengths[place]
        padding += longest - lengths[place]
        rows = min(batch_size, CACHED_TOKENS // (longest + max_new_tokens))
        if batch and (len(batch) >= rows or padding > PADDING):
            yield batch
            batch, padding = [], 0
        batch.append(place)
    if batch:
        yield batch
