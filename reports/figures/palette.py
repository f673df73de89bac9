"""One look for every method, the same in every figure and on the page."""

from collections.abc import Iterable

# Okabe and Ito's colours, told apart with any common colour blindness (yellow is left out: too pale for lines).
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")
# In this order, so that those that are most often shown together differ in their colour.
_METHODS = (
    "reap", "hc_smoe", "m_smoe", "frequency", "coverage", "reap_coverage", "random",
    "gate_sum", "ean_mean", "ean_sum", "weighted_ean_sum", "soft_count", "max_activation", "weight_norm",
    "importance_product", "activation_channels", "magnitude_channels", "random_channels",
)  # fmt: skip


def looks(labels: Iterable[str]) -> dict[str, tuple[str, str]]:
    """label -> (colour, marker), no two alike up to 63 labels.

    A method of this project has its own, whatever else is shown; a label that says more than the method (its settings)
    and a method from elsewhere take the next free one, a variant in the colour of its method.
    """
    wanted = sorted(set(labels), key=lambda label: (label not in _METHODS, label))
    taken: dict[str, tuple[str, str]] = {}
    for label in wanted:
        own = _place(label.partition(" ")[0])
        everywhere = [_at(place) for place in range(own, own + len(COLOURS) * len(MARKERS))]
        same_colour = [look for look in everywhere if look[0] == everywhere[0][0]]
        free = [look for look in [*same_colour, *everywhere] if look not in taken.values()]
        taken[label] = free[0] if free else everywhere[0]
    return taken


def _place(method: str) -> int:
    return _METHODS.index(method) if method in _METHODS else len(_METHODS)


def _at(place: int) -> tuple[str, str]:
    """The colours in turn, with the next marker each time they begin again."""
    return COLOURS[place % len(COLOURS)], MARKERS[(place + place // len(COLOURS)) % len(MARKERS)]
