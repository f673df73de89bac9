"""The transformers backend: generation with a key-value cache, and log-likelihoods, in batches.

Requests are sorted by length, so that a batch pads little, and answered in the order given. No special tokens
are added to any text. All is deterministic; the batch a request falls into changes its result by rounding.
"""

import gc
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from harness.backends import timed
from harness.backends.decoding import Choice, StopStrings, can_select_rows, prompt_batches, roomy_cache, select_rows
from harness.backends.ending import end_marks, end_tokens, end_tokens_of
from harness.backends.scoring import (
    Asked,
    Decoder,
    LayerByLayer,
    WholeModel,
    expected,
    hidden_states,
    likeliest,
    sums,
    tokens_at_once,
)
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
from harness.checkpoints.by_layer import ModelByLayer
from harness.checkpoints.hub import resolve_checkpoint
from harness.checkpoints.load import load_model
from harness.checkpoints.offload import one_device
from harness.checkpoints.quantize import served_facts
from harness.checkpoints.tokenizer import load_tokenizer
from harness.contracts.backend import Distributions, LogLikelihood, Sampling, TokenLogprobs
from harness.devices import alone_on
from harness.errors import WinnowError
from harness.progress import bar as progress_bar

# Finished sequences leave the batch once they are this share of it: each departure copies the cache.
COMPACT_SHARE = 0.25


class HFBackend:
    """Decoding and scoring with a causal language model of transformers.

    ``batch_size`` is the number of sequences in a batch; ``max_length`` the longest sequence in tokens
    (default: the model's own); ``ends`` the end tokens (default: those of the model in memory and its tokenizer).
    A ``ModelByLayer`` scores, each call reading all weights once, and does not write. ``held`` is let go of when the
    model is free. Raises WinnowError where a request does not fit into it.
    """

    name = "hf"

    def __init__(
        self,
        model: PreTrainedModel | ModelByLayer,
        tokenizer: Any,
        batch_size: int = 128,
        max_length: int | None = None,
        ends: frozenset[int] | None = None,
        held: ExitStack | None = None,
    ) -> None:
        if batch_size < 1 or (max_length is not None and max_length < 2):
            raise WinnowError(f"batch_size={batch_size}, max_length={max_length}: needs at least 1 and 2")
        self._held = ExitStack() if held is None else held
        self.streamed = isinstance(model, ModelByLayer)
        self.model: Any = model if isinstance(model, ModelByLayer) else model.eval()
        self.tokenizer, self.batch_size = tokenizer, batch_size
        self._decoder: Decoder = LayerByLayer(model) if isinstance(model, ModelByLayer) else WholeModel(model)
        config = model.config.get_text_config()
        self.has_chat_template = has_chat_template(tokenizer)
        self.seconds = {"generate": 0.0, "score": 0.0}
        self.facts: dict[str, Any] = {"version": transformers.__version__}
        self.max_length: int = max_length or getattr(config, "max_position_embeddings", None) or 2048
        # A call of a streamed model reads all weights, whose contexts then go through with each continuation.
        self._shares_contexts = not self.streamed and can_select_rows(model.config)
        if ends is None:
            generation = getattr(model, "generation_config", None)
            in_memory = (config.eos_token_id, getattr(generation, "eos_token_id", None))
            ends = end_tokens(tokenizer, *({"eos_token_id": found} for found in in_memory))
        self.ends, self._end_marks = ends, end_marks(tokenizer)
        self._marks = thought_marks(tokenizer)
        self.facts["end_tokens"] = sorted(ends)
        self._pad: int = next(
            (token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id) if token is not None), 0
        )

    def close(self) -> None:
        """Free the model. Hooks that move its weights refer to it in circles, which only the collector breaks."""
        self.__dict__.pop("model", None)
        self.__dict__.pop("_decoder", None)
        gc.collect()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
        self._held.close()

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

        Greedy where ``sampling`` is None. A prompt that leaves no room for them is cut on the left. Raises WinnowError
        for a model that is read layer by layer.
        """
        if self.streamed:
            raise WinnowError(
                "backend.stream=true scores texts but writes none, since each token would read all weights again: "
                "take a suite that only scores, or backend.stream=false where the model fits"
            )
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

        Continuations of one context share its forward pass, where the model's cache can be shared.
        """
        requests = list(scoring_requests(self.tokenizer, pairs, self.max_length + 1))
        results = [LogLikelihood(0.0, 0)] * len(pairs)
        score = self._score_sharing if self._shares_contexts else self._score_alone
        with timed(self.seconds, "score"), progress_bar(progress, len(pairs)) as bar:
            for request, logprob in score(requests, progress):
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
            for places, found in self._sums([Asked(part, 1) for _, part in parts], progress):
                for place, logprob in zip(places, found, strict=True):
                    logprobs[parts[place][0]] += logprob
                    counts[parts[place][0]] += len(parts[place][1]) - 1
                bar.update(len(places))
        return [LogLikelihood(*both) for both in zip(logprobs, counts, strict=True)]

    def token_logprobs(self, texts: Sequence[str], top: int, progress: str = "") -> list[TokenLogprobs]:
        """For every token of each text but the first: its log-probability, and the ``top`` likeliest tokens instead.

        Raises WinnowError for a text that is longer than the model's length.
        """
        encoded = encode(self.tokenizer, texts)
        longest = max(map(len, encoded), default=0)
        if longest > self.max_length + 1 or not 1 <= top <= self._decoder.vocabulary:
            raise WinnowError(
                f"top={top}, longest text of {longest} tokens: needs 1 to {self._decoder.vocabulary} and at most "
                f"{self.max_length + 1}"
            )
        results: list[TokenLogprobs] = [TokenLogprobs.empty(tokens, top) for tokens in encoded]
        scored = [i for i, tokens in enumerate(encoded) if len(tokens) > 1]
        with timed(self.seconds, "score"), progress_bar(progress, len(scored)) as bar:
            for places, hidden in self._hidden([Asked(encoded[i], 1) for i in scored], progress):
                for place, states in zip(places, hidden, strict=True):
                    results[scored[place]] = likeliest(self._decoder, states, encoded[scored[place]][1:], top)
                bar.update(len(places))
        return results

    def distributions(
        self, pairs: Sequence[tuple[str, str]], positions: int, progress: str = ""
    ) -> Iterator[tuple[int, Distributions]]:
        """For each (context, continuation) the log-probabilities of the whole vocabulary, float32, at the first
        ``positions`` tokens of the continuation; batch by batch, longest first, tokenized as ``loglikelihood`` does.
        """
        requests = list(scoring_requests(self.tokenizer, pairs, self.max_length + 1))
        with timed(self.seconds, "score"), progress_bar(progress, len(requests)) as bar:
            asked = [Asked([*one.context, *one.continuation], len(one.context)) for one in requests]
            for places, hidden in self._hidden(asked, progress):
                for place, states in zip(places, hidden, strict=True):
                    tokens = requests[place].continuation
                    yield requests[place].index, expected(self._decoder, states, tokens, positions)
                bar.update(len(places))

    # Batches

    def _hidden(self, asked: Sequence[Asked], label: str) -> Iterator[tuple[list[int], list[Tensor]]]:
        return hidden_states(self._decoder, asked, self.batch_size, lambda batch: self._pad_right(batch)[0], label)

    def _sums(self, asked: Sequence[Asked], label: str) -> Iterator[tuple[list[int], list[float]]]:
        """Places in ``asked``, batch by batch, and the log-likelihoods of what is scored of each."""
        for places, hidden in self._hidden(asked, label):
            yield places, sums(self._decoder, hidden, [asked[place].targets for place in places])

    def _group_batches(self, groups: dict[tuple[int, ...], list[Request]]) -> Iterator[list[list[Request]]]:
        """Groups of one context each, longest first, with at most ``batch_size`` requests together."""
        batch: list[list[Request]] = []
        size, limit = 0, tokens_at_once(self._decoder.device)
        for context in sorted(groups, key=lambda context: (-len(context), context)):
            for start in range(0, len(groups[context]), self.batch_size):
                group = groups[context][start : start + self.batch_size]
                width = len(batch[0][0].context) if batch else 0
                if batch and (size + len(group) > self.batch_size or (len(batch) + 1) * width > limit):
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
        largest, rows = max(map(max, ids)), self._decoder.rows
        if largest >= rows:
            raise WinnowError(
                f"token {largest} is outside the model's vocabulary of {rows}: the tokenizer is another's"
            )
        return self._tensor(ids)

    def _tensor(self, values: list[Any]) -> Tensor:
        return torch.tensor(values, device=self._decoder.device)

    # The model

    def _forward(self, ids: Tensor, mask: Tensor | None, positions: Tensor, cache: DynamicCache) -> Tensor:
        """(n, V): the logits behind the last token of each row."""
        logits: Tensor = self.model(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True,
            logits_to_keep=1,
        ).logits  # fmt: skip
        return logits[:, -1]

    def _start(self, sequences: Sequence[Sequence[int]]) -> tuple[DynamicCache, Tensor, Tensor]:
        """Run contexts padded on the left: the cache, the mask [n, width], last logits [n, vocabulary]."""
        ids, mask = self._pad_left(sequences)
        cache = roomy_cache(self.model.config)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        # A mask of ones is left out: attention then needs no matrix of all pairs of tokens.
        padded = mask if len(set(map(len, sequences))) > 1 else None
        return cache, mask, self._forward(ids, padded, positions, cache)

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
                cache.reorder_cache(keep)  # type: ignore[arg-type]
                chosen, mask, positions = chosen[keep], mask[keep], positions[keep]
                rows, running = [rows[i] for i in keep.tolist()], [True] * active
            logits = self._forward(chosen[:, None], mask[:, : width + step], positions, cache)
            positions = positions + 1
        return written

    def _score_alone(self, requests: Sequence[Request], label: str) -> Iterator[tuple[Request, float]]:
        """Each continuation behind its own context."""
        asked = [Asked([*one.context, *one.continuation], len(one.context)) for one in requests]
        for places, found in self._sums(asked, label):
            yield from zip((requests[place] for place in places), found, strict=True)

    @torch.inference_mode()
    def _score_sharing(self, requests: Sequence[Request], label: str) -> Iterator[tuple[Request, float]]:
        """A batch of contexts once, then what follows each."""
        groups: dict[tuple[int, ...], list[Request]] = defaultdict(list)
        for request in requests:
            groups[request.context].append(request)
        for batch in self._group_batches(groups):
            yield from self._score_groups(batch)

    def _score_groups(self, groups: list[list[Request]]) -> Iterator[tuple[Request, float]]:
        decoder = self._decoder
        assert isinstance(decoder, WholeModel)
        cache, mask, last = self._start([group[0].context for group in groups])
        both = [(row, request) for row, group in enumerate(groups) for request in group]
        first = (
            last.float()
            .log_softmax(-1)[
                self._tensor([row for row, _ in both]), self._tensor([request.continuation[0] for _, request in both])
            ]
            .tolist()
        )
        scores = {request.index: score for (_, request), score in zip(both, first, strict=True)}
        rest = []
        for row, request in both:
            if len(request.continuation) == 1:
                yield request, scores[request.index]
            else:
                rest.append((row, request))
        rest.sort(key=lambda pair: -len(pair[1].continuation))
        while rest:
            size = max(1, tokens_at_once(self._decoder.device) // len(rest[0][1].continuation))
            part, rest = rest[:size], rest[size:]
            rows = self._tensor([row for row, _ in part])
            inputs, own_mask = self._pad_right([request.continuation[:-1] for _, request in part])
            starts = self._tensor([[len(request.context)] for _, request in part])
            hidden = decoder.forward(
                input_ids=inputs,
                attention_mask=torch.cat([mask[rows], own_mask], dim=1),
                position_ids=starts + torch.arange(inputs.shape[1], device=inputs.device),
                past_key_values=select_rows(cache, rows),
                use_cache=True,
            )
            targets = [request.continuation[1:] for _, request in part]
            states = [row[: len(of_one)] for row, of_one in zip(hidden, targets, strict=True)]
            for (_, request), logprob in zip(part, sums(self._decoder, states, targets), strict=True):
                yield request, scores[request.index] + logprob


def open_checkpoint(
    folder: str, dtype: str, device: Any, batch_size: int, max_length: int | None, stream: bool | None = None
) -> HFBackend:
    """The backend of ``backend=hf``: the model and tokenizer in ``folder``, until it is closed alone on its devices.

    ``stream`` reads one decoder layer at a time, for scores of a model that is larger than memory. Raises WinnowError
    as they do.
    """
    path = resolve_checkpoint(folder)
    tokenizer = load_tokenizer(path)
    ends = end_tokens_of(path, tokenizer)
    with ExitStack() as held:
        held.enter_context(alone_on(device))
        model = ModelByLayer(path, dtype, one_device(device)) if stream else load_model(path, dtype, device)
        backend = HFBackend(model, tokenizer, batch_size, max_length, ends, held.pop_all())
    backend.facts |= served_facts(path)
    return backend
