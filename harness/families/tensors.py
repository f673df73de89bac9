"""How a checkpoint names and lays out the tensors of its routed experts: data for the family table."""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class ExpertTensor:
    """A tensor on disk that holds routed experts.

    ``name`` has a place for the layer, and one for the expert unless the tensor *stacks* all experts of the layer
    along its first dimension. ``axes`` are the dimensions of one expert's part, each "hidden" or "channel".
    ``matrices`` lie along the channel axis: one of "gate", "up" and "down", or gate and up, one behind the other or
    (``interleaved``) channel by channel. A part of one axis is the bias of its matrices.
    """

    name: str
    axes: tuple[str, ...]
    matrices: tuple[str, ...]
    interleaved: bool = False

    @property
    def is_stacked(self) -> bool:
        return "{expert}" not in self.name

    @property
    def is_bias(self) -> bool:
        return len(self.axes) == 1

    @property
    def channel_axis(self) -> int | None:
        return self.axes.index("channel") if "channel" in self.axes else None

    def names(self, layer: int, experts: int | Iterable[int]) -> list[str]:
        """The tensors that hold the experts 0 to ``experts`` - 1, or those so numbered: one each, or one for all."""
        if self.is_stacked:
            return [self.name.format(layer=layer)]
        numbers = range(experts) if isinstance(experts, int) else experts
        return [self.name.format(layer=layer, expert=expert) for expert in numbers]

    def shape(self, width: int, hidden: int) -> tuple[int, ...]:
        """That of one expert's part."""
        sizes = {"hidden": hidden, "channel": width * len(self.matrices)}
        return tuple(sizes[axis] for axis in self.axes)

    def places(self, channels: Iterable[int], width: int) -> list[int]:
        """Where ``channels`` of an expert of ``width`` channels lie along the channel axis, in their order."""
        count = len(self.matrices)
        if self.interleaved:
            return [channel * count + place for channel in channels for place in range(count)]
        chosen = list(channels)
        return [place * width + channel for place in range(count) for channel in chosen]


def separate(prefix: str, gate: str, up: str, down: str) -> tuple[ExpertTensor, ...]:
    """A matrix of one expert a tensor, in the layout of ``nn.Linear``."""
    experts = "model.layers.{layer}." + prefix + ".experts.{expert}."
    return (
        ExpertTensor(f"{experts}{gate}.weight", ("channel", "hidden"), ("gate",)),
        ExpertTensor(f"{experts}{up}.weight", ("channel", "hidden"), ("up",)),
        ExpertTensor(f"{experts}{down}.weight", ("hidden", "channel"), ("down",)),
    )
