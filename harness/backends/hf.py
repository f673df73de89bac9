"""The transformers backend: generation with a key-value cache, and log-likelihoods, in batches.

Requests are sorted by length, so that a batch pads little, and answered in the order given. No special tokens
are added to any text. All is deterministic; the batch a request falls into changes its result by rounding.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from harness.backends import timed
from harness.backends.decoding import Choice, StopStrings, roomy_cache, select_rows
from harness.backends.ending import end_marks, end_tokens, end_tokens_of
from harness.backends.thinking import thinking_options
from harness.backends.tokens import (
    Request,
    cut,
    decode,
    encode,
    has_chat_template,
    prompt_text,
    prompts_that_fit,
    scoring_requests,
    stops_by_prompt,
    thought_marks,
    windows,
)
from harness.checkpoints.hub import resolve_checkpoint
from harness.checkpoints.load import load_model
from harness.checkpoints.quantize import served_facts
from harness.checkpoints.tokenizer import load_tokenizer
from harness.contracts.backend import Distributions, LogLikelihood, Sampling, TokenLogprobs
from harness.errors import WinnowError
from harness.progress import bar as progress_bar

# Finished sequences leave the batch once they are this share of it: each departure copies the cache.
COMPACT_SHARE = 0.25
# At most this many logits at once (256 MB in float32): a batch shrinks where the vocabulary is large.
LOGIT_BUDGET = 2**26
# Scored tokens in a batch on a CPU: what they need then stays in its caches and in memory that is reused.
CPU_TOKENS = 1024
# Generation: tokens that the cache of a batch has room for, and tokens that pad its prompts to the longest.
CACHED_TOKENS = 2**17
PADDING = 2**12


class HFBackend:
    """Decoding and scoring with a causal language model of transformers.

    ``batch_size`` is the number of sequences in a batch; ``max_length`` the longest sequence in tokens
    (default: the model's own); ``ends`` the end tokens (default: those of the model in memory and its tokenizer).
    Raises WinnowError where a request does not fit into it.
    """

    name = "hf"

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        batch_size: int = 128,
        max_length: int | None = None,
        ends: frozenset[int] | None = None,
    ) -> None:
        if batch_size < 1 or (max_length is not None and max_length < 2):
            raise WinnowError(f"batch_size={batch_size}, max_length={max_length}: needs at least 1 and 2")
        self.model, self.tokenizer, self.batch_size = model.eval(), tokenizer, batch_size
        config = model.config.get_text_config()
        self.has_chat_template = has_chat_template(tokenizer)
        self.seconds = {"generate": 0.0, "score": 0.0}
        self.facts: dict[str, Any] = {"version": transformers.__version__}
        self.max_length: int = max_length or getattr(config, "max_position_embeddings", None) or 2048
        self._vocabulary: int = config.vocab_size
        if ends is None:
            in_memory = (config.eos_token_id, getattr(model.generation_config, "eos_token_id", None))
            ends = end_tokens(tokenizer, *({"eos_token_id": found} for found in in_memory))
        self.ends, self._end_marks = ends, end_marks(tokenizer)
        self._marks = thought_marks(tokenizer)
        self.facts["end_tokens"] = sorted(ends)
        self._pad: int = next(
            (token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id) if token is not None), 0
        )

    def close(self) -> None:
        """Free the model."""
        del self.model

    def prompt(self, prompt: str | Sequence[Mapping[str, str]], **options: Any) -> str:
        """The text or messages as the model reads them (``tokens.prompt_text``)."""
        return prompt_text(self.tokenizer, prompt, options)

    def thinking_options(self, wanted: str) -> dict[str, Any]:
        """What turns thinking "on" or "off" in this model's chat template (``thinking.thinking_options``)."""
        return thinking_options(self.tokenizer, wanted)

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
        stops = stops_by_prompt(stop, len(prompts), self._end_marks)
        watches = {texts: StopStrings(self.tokenizer, texts) for texts in set(stops)}
        answers = [""] * len(encoded)
        with timed(self.seconds, "generate"), progress_bar(progress, len(encoded)) as bar:
            for batch in prompt_batches([len(tokens) for tokens in encoded], max_new_tokens, self.batch_size):
                choice = Choice(sampling, batch)
                watching = [watches[stops[i]] for i in batch]
                written = self._continue([encoded[i] for i in batch], max_new_tokens, watching, choice, bar)
                for i, tokens in zip(batch, written, strict=True):
                    answers[i] = cut(decode(self.tokenizer, encoded[i], tokens, self._marks), stops[i])
        return answers

    def loglikelihood(self, pairs: Sequence[tuple[str, str]], progress: str = "") -> list[LogLikelihood]:
        """The log-likelihood of each continuation, tokenized together with its context (``tokens.scoring_requests``).

        Continuations of one context share its forward pass.
        """
        groups: dict[tuple[int, ...], list[Request]] = defaultdict(list)
        for request in scoring_requests(self.tokenizer, pairs, self.max_length + 1):
            groups[request.context].append(request)
        results = [LogLikelihood(0.0, 0)] * len(pairs)
        with timed(self.seconds, "score"), progress_bar(progress, len(pairs)) as bar, torch.inference_mode():
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
        with timed(self.seconds, "score"), progress_bar(progress, len(parts)) as bar:
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
        with timed(self.seconds, "score"), progress_bar(progress, len(scored)) as bar:
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

    def distributions(
        self, pairs: Sequence[tuple[str, str]], positions: int, progress: str = ""
    ) -> Iterator[tuple[int, Distributions]]:
        """For each (context, continuation) the log-probabilities of the whole vocabulary, float32, at the first
        ``positions`` tokens of the continuation; batch by batch, longest first, tokenized as ``loglikelihood`` does.
        """
        requests = list(scoring_requests(self.tokenizer, pairs, self.max_length + 1))
        with timed(self.seconds, "score"), progress_bar(progress, len(requests)) as bar:
            for batch, logits in self._forward_all([[*r.context, *r.continuation] for r in requests]):
                for row, place in enumerate(batch):
                    request = requests[place]
                    count, start = len(request.continuation), len(request.context) - 1
                    logprobs = logits[row, start : start + count].float().log_softmax(-1)
                    own = logprobs[torch.arange(count), request.continuation]
                    yield (
                        request.index,
                        Distributions(
                            np.array(request.continuation), own.cpu().numpy(), logprobs[:positions].cpu().numpy()
                        ),
                    )
                bar.update(len(batch))

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
        return self._known(ids), self._tensor(mask)

    def _pad_right(self, sequences: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        width = max(map(len, sequences))
        ids = [list(s) + [self._pad] * (width - len(s)) for s in sequences]
        mask = [[1] * len(s) + [0] * (width - len(s)) for s in sequences]
        return self._known(ids), self._tensor(mask)

    def _known(self, ids: list[list[int]]) -> Tensor:
        """Raises WinnowError for a token that the model has no row for."""
        largest = max(map(max, ids))
        rows = self.model.get_input_embeddings().weight.shape[0]
        if largest >= rows:
            raise WinnowError(
                f"token {largest} is outside the model's vocabulary of {rows}: the tokenizer is another's"
            )
        return self._tensor(ids)

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
        cache = roomy_cache(self.model.config)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        # A mask of ones is left out: attention then needs no matrix of all pairs of tokens.
        padded = mask if len(set(map(len, sequences))) > 1 else None
        return cache, mask, self._forward(ids, padded, positions, cache, last=True)[:, -1]

    @torch.inference_mode()
    def _continue(
        self, prompts: list[list[int]], max_new: int, stops: list[StopStrings], choice: Choice, bar: Any
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
                if token not in self.ends:
                    answer.append(token)
                if token in self.ends or step == max_new or stops[rows[i]].reached(answer):
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
            logits = self._forward(inputs, both, positions, select_rows(cache, rows), last=False)
            logprobs = _gather(logits, [request.continuation[1:] for _, request in part])
            for (_, request), logprob in zip(part, logprobs, strict=True):
                yield request, scores[request.index] + float(logprob.double().sum())


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


def _gather(logits: Tensor, targets: Sequence[Sequence[int]]) -> list[Tensor]:
    """The log-probability of each target token; row i of ``logits`` [n, width, vocabulary] is for row i."""
    return [
        row[: len(target)].float().log_softmax(-1)[torch.arange(len(target)), list(target)]
        for row, target in zip(logits, targets, strict=True)
    ]


def open_checkpoint(folder: str, dtype: str, device: Any, batch_size: int, max_length: int | None) -> HFBackend:
    """The backend of ``backend=hf``: the model and tokenizer in ``folder``. Raises WinnowError as they do."""
    path = resolve_checkpoint(folder)
    tokenizer = load_tokenizer(path)
    ends = end_tokens_of(path, tokenizer)
    backend = HFBackend(load_model(path, dtype, device), tokenizer, batch_size, max_length, ends)
    backend.facts |= served_facts(path)
    return backend
