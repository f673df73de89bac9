"""What of a model bounds a plan."""

from dataclasses import dataclass


@dataclass(frozen=True)
class MoeShape:
    """The MoE layers of a model, as far as they bound a plan; all of it is known from config.json.

    ``num_experts`` experts in each layer, of which a token chooses ``top_k``; the router chooses within ``n_group``
    groups of equal size (1: none). ``layers`` MoE layers whose experts have ``width`` channels; ``width`` is None where
    it is not known, and what hangs on it is then not checked. A layer runs with ``fewest_rows`` router rows and more
    (0: no more than ``top_k`` asks for). ``one_width``: the experts of a layer share a tensor, and so a width.
    """

    num_experts: int
    top_k: int
    n_group: int = 1
    layers: int = 1
    width: int | None = None
    fewest_rows: int = 0
    one_width: bool = False
