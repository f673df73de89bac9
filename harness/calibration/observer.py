"""What looks at one MoE layer while text goes through it: the protocol that every pass serves."""

from contextlib import AbstractContextManager
from typing import Protocol

from harness.calibration.batches import BatchLayout
from harness.families.moe_block import MoeBlock


class Observer(Protocol):
    """Looks at one MoE layer while batch after batch goes through it."""

    @property
    def layer(self) -> int:
        """The index of the decoder layer."""
        ...

    def watching(self, block: MoeBlock) -> AbstractContextManager[None]:
        """Hooks on ``block`` for as long as the context lasts. All batches go through it inside of the context.

        Where the context ends without an error, the observer finishes what needs the weights of the block.
        """
        ...

    def start_batch(self, layout: BatchLayout) -> None: ...

    def end_batch(self) -> None:
        """The batch is through the layer. Raises WinnowError where what was seen is not finite."""
        ...
