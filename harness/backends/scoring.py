"""Log-probabilities with transformers: the decoder once over whole sequences, the head in slices of what is asked for.

A vocabulary of 152,000 makes 0.6 MB of each position, a decoder layer a few KB. So a batch is as large as its hidden
states allow, the positions that nobody asks for never meet the head, and the others meet it ``LOGITS`` at a time.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import MoeModelOutputWithPast

from harness.checkpoints.by_layer import ModelByLayer
from harness.checkpoints.offload import device_of
from harness.contracts.backend import Distributions, TokenLogprobs
from harness.progress import bar as progress_bar

# At most this many logits at once (256 MB in float32).
LOGITS = 2**26
# Tokens in a batch on a CPU: what they need then stays in its caches and in memory that is reused; and on a GPU.
CPU_TOKENS, GPU_TOKENS = 2**10, 2**14
# Layer by layer: hidden states that are kept, in bytes. More are done in turns, each of which reads all weights.
KEPT = 4 * 2**30


@dataclass(frozen=True)
class Asked:
    """A sequence of which the tokens from place ``first`` >= 1 on are scored."""

    tokens: Sequence[int]
    first: int

    @property
    def targets(self) -> Sequence[int]:
        return self.tokens[self.first :]


class Decoder(Protocol):
    """A model in two halves. ``device`` is where it takes tokens, ``rows`` how many it knows, ``vocabulary`` how many
    it expects."""

    device: torch.device
    rows: int
    vocabulary: int

    def hidden_states(self, batches: Sequence[Tensor], label: str) -> Iterator[Tensor]:
        """(B, L, H) for each of ``batches`` (B, L) of tokens. Until the next is asked for, so may ``logits`` be."""
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """(n, V) from hidden states (n, H)."""
        ...


class WholeModel:
    """All layers at once, on their devices."""

    def __init__(self, model: PreTrainedModel) -> None:
        embedding: Any = model.get_input_embeddings()
        self._model, self.device, self.rows = model, device_of(embedding), embedding.weight.shape[0]
        self.vocabulary: int = model.config.get_text_config().vocab_size

    def hidden_states(self, batches: Sequence[Tensor], label: str = "") -> Iterator[Tensor]:
        # Padding on the right and causal attention: no token sees any, so no mask is needed.
        return (self.forward(input_ids=ids, use_cache=False) for ids in batches)

    def forward(self, **inputs: Any) -> Tensor:
        """(B, L, H): the hidden states behind the decoder."""
        hidden: Tensor = self._model.base_model(**inputs).last_hidden_state
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """By the model's own forward, whatever it does to them behind its decoder, which is left out."""
        known = MoeModelOutputWithPast(last_hidden_state=hidden.unsqueeze(0))  # type: ignore[arg-type]
        inputs = torch.zeros(1, len(hidden), dtype=torch.int64, device=hidden.device)
        decoder: Any = self._model.base_model
        own = vars(decoder).get("forward")  # accelerate's, where it moves weights
        decoder.forward = lambda *args, **options: known
        try:
            answer: Any = self._model(input_ids=inputs, use_cache=False)
        finally:
            del decoder.forward
            if own is not None:
                decoder.forward = own
        return answer.logits[0]


class LayerByLayer:
    """One decoder layer at a time: all batches go through it before the next is read."""

    def __init__(self, model: ModelByLayer) -> None:
        embedding: Any = model.skeleton.get_input_embeddings()
        self._model, self.device, self.rows = model, model.device, embedding.weight.shape[0]
        self.vocabulary: int = model.config.get_text_config().vocab_size
        self._bytes_a_token = embedding.weight.shape[1] * embedding.weight.element_size()

    def hidden_states(self, batches: Sequence[Tensor], label: str) -> Iterator[Tensor]:
        for turn in self._turns(batches):
            kept: list[Any] = [None] * len(turn)
            with progress_bar(label and f"{label}: layers", self._model.depth * len(turn)) as bar:
                for layer in self._model.layers(range(self._model.depth)):
                    for place, ids in enumerate(turn):
                        kept[place] = self._model.run(layer, kept[place], {"input_ids": ids}).cpu()
                        bar.update()
            with self._model.head():
                while kept:
                    yield kept.pop(0)

    def logits(self, hidden: Tensor) -> Tensor:
        inputs = torch.zeros(1, len(hidden), dtype=torch.int64)
        return self._model.logits(hidden.unsqueeze(0), {"input_ids": inputs})[0]

    def _turns(self, batches: Sequence[Tensor]) -> Iterator[list[Tensor]]:
        turn: list[Tensor] = []
        size = 0
        for batch in batches:
            needed = batch.numel() * self._bytes_a_token
            if turn and size + needed > KEPT:
                yield turn
                turn, size = [], 0
            turn.append(batch)
            size += needed
        if turn:
            yield turn


def tokens_at_once(device: torch.device) -> int:
    """Tokens in a batch that is scored."""
    return CPU_TOKENS if device.type == "cpu" else GPU_TOKENS


@torch.inference_mode()
def hidden_states(
    decoder: Decoder,
    asked: Sequence[Asked],
    batch_size: int,
    padded: Callable[[Sequence[Sequence[int]]], Tensor],
    label: str = "",
) -> Iterator[tuple[list[int], list[Tensor]]]:
    """Batches of ``asked``, the longest first: their places, and of each the hidden states (n, H) that its n scored
    tokens are expected from.

    ``padded`` makes the tokens of a batch of sequences, padded on the right. ``label`` is of a bar for what takes long
    before the first batch is there.
    """
    batches = list(_batches([len(one.tokens) - 1 for one in asked], batch_size, tokens_at_once(decoder.device)))
    inputs = [padded([asked[place].tokens[:-1] for place in batch]) for batch in batches]
    for batch, hidden in zip(batches, decoder.hidden_states(inputs, label), strict=True):
        yield (
            batch,
            [hidden[row, asked[place].first - 1 : len(asked[place].tokens) - 1] for row, place in enumerate(batch)],
        )


@torch.inference_mode()
def log_probabilities(decoder: Decoder, hidden: Tensor) -> Iterator[Tensor]:
    """Slices (n, V) float32 of the log-probabilities of the vocabulary behind ``hidden`` (P, H), in their order."""
    for part in hidden.split(max(1, LOGITS // decoder.vocabulary)):
        yield decoder.logits(part).float().log_softmax(-1)


def of_tokens(logprobs: Iterable[Tensor], tokens: Sequence[int]) -> Tensor:
    """(P,) float32 in the host's memory: of ``logprobs`` in slices (n, V), P rows in all, those of ``tokens``."""
    found, start = [], 0
    for part in logprobs:
        chosen = torch.tensor(tokens[start : start + len(part)], device=part.device)
        found.append(part.gather(1, chosen.unsqueeze(1)).squeeze(1))
        start += len(part)
    return torch.cat(found).cpu()


def sums(decoder: Decoder, hidden: Sequence[Tensor], tokens: Sequence[Sequence[int]]) -> list[float]:
    """The log-likelihood of each of ``tokens``, of which ``hidden`` has the hidden states (n, H) before them."""
    flat = [token for of_one in tokens for token in of_one]
    found = of_tokens(log_probabilities(decoder, torch.cat(list(hidden))), flat)
    return [float(part.double().sum()) for part in found.split([len(of_one) for of_one in tokens])]


@torch.inference_mode()
def likeliest(decoder: Decoder, hidden: Tensor, tokens: Sequence[int], top: int) -> TokenLogprobs:
    """Of ``tokens`` (P,) and the ``top`` others in their places; ``hidden`` (P, H) comes before them."""
    own, best, start = [], [], 0
    for part in log_probabilities(decoder, hidden):
        own.append(of_tokens([part], tokens[start : start + len(part)]))
        best.append([found.cpu() for found in part.topk(top, dim=-1)])
        start += len(part)
    values, indices = (torch.cat(parts).numpy() for parts in zip(*best, strict=True))
    return TokenLogprobs(np.array(tokens), torch.cat(own).numpy(), indices, values)


@torch.inference_mode()
def expected(decoder: Decoder, hidden: Tensor, tokens: Sequence[int], positions: int) -> Distributions:
    """Of the whole vocabulary in the first ``positions`` of ``tokens`` (P,); ``hidden`` (P, H) comes before them."""
    own, whole, start = [], [], 0
    for part in log_probabilities(decoder, hidden):
        own.append(of_tokens([part], tokens[start : start + len(part)]))
        whole.append(part[: max(0, positions - start)].cpu())
        start += len(part)
    return Distributions(np.array(tokens), torch.cat(own).numpy(), torch.cat(whole).numpy())


def _batches(lengths: Sequence[int], batch_size: int, tokens: int) -> Iterator[list[int]]:
    """Places, the longest first; a batch has at most ``batch_size`` rows, and ``tokens`` unless it has one row."""
    order = sorted(range(len(lengths)), key=lambda place: -lengths[place])
    while order:
        rows = max(1, min(batch_size, tokens // lengths[order[0]]))
        yield order[:rows]
        order = order[rows:]
