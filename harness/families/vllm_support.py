"""What is known of an architecture in vLLM; the family table (``harness.families.table``) says it of each."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Served:
    """What is known of an architecture in vLLM 0.32, whose faults show nowhere but in what it writes.

    ``refused``: why it is not served at all; ``refused_on_cpu`` likewise, by the CPU build; ``cpu_arguments``: what
    its engine is given on a CPU to compute right; ``shared_width``: the config keys whose product is the width of the
    shared expert, which vLLM would cut to that without a word; ``compact``: whether the plugin was tried with it;
    ``needs``: values that the config must state, because vLLM takes another where they are absent.
    """

    refused: str = ""
    refused_on_cpu: str = ""
    cpu_arguments: Mapping[str, Any] = field(default_factory=dict)
    shared_width: tuple[str, ...] = ()
    compact: bool = False
    needs: Mapping[str, Any] = field(default_factory=dict)
