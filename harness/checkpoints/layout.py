"""The compact layout: what is stored of every MoE layer, and the section of config.json that says so."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from harness.errors import WinnowError
from harness.families.family import Family

SECTION = "winnow"


@dataclass(frozen=True)
class LayerLayout:
    """What is stored of one MoE layer: expert e has ``widths[e]`` channels, router row r leads to ``route[r]``."""

    widths: tuple[int, ...]
    route: tuple[int, ...]

    @property
    def experts(self) -> int:
        return len(self.widths)

    @property
    def rows(self) -> int:
        return len(self.route)

    @property
    def width(self) -> int:
        """That of the widest expert."""
        return max(self.widths)

    @property
    def is_ragged(self) -> bool:
        return len(set(self.widths)) > 1

    def padded_to(self, width: int) -> "LayerLayout":
        return LayerLayout((width,) * self.experts, self.route)

    @property
    def is_direct(self) -> bool:
        """Row r leads to expert r: an ordinary MoE layer."""
        return self.route == tuple(range(self.experts))


def layer_layouts(config: Mapping[str, Any], family: Family) -> dict[int, LayerLayout]:
    """The layout of every MoE layer, plain or compact. Raises WinnowError for a broken config."""
    try:
        moe_layers = family.moe_layers(config)
        if SECTION not in config:
            count = family.num_experts(config)
            widths = (int(config[family.width_key]),) * count
            return dict.fromkeys(moe_layers, LayerLayout(widths, tuple(range(count))))
        if config[SECTION]["version"] != 1:
            raise WinnowError(f"config.json: layout version {config[SECTION]['version']} is newer than this winnow")
        stored = config[SECTION]["layers"]
        layouts = {
            layer: LayerLayout(_stored_widths(layer, stored[str(layer)]), tuple(stored[str(layer)]["route"]))
            for layer in moe_layers
        }
    except (KeyError, TypeError, ValueError) as error:
        raise WinnowError(f"config.json does not describe a complete model: {error!r}") from error
    for layer, layout in layouts.items():
        if not layout.experts or set(layout.route) != set(range(layout.experts)):
            raise WinnowError(f"config.json: the route of layer {layer} does not fit its {layout.experts} experts")
    return layouts


def _stored_widths(layer: int, stored: Mapping[str, Any]) -> tuple[int, ...]:
    experts, width = int(stored["experts"]), stored["width"]
    widths = tuple(width) if isinstance(width, list) else (int(width),) * experts
    if len(widths) != experts:
        raise WinnowError(f"config.json: layer {layer} has {experts} experts, but {len(widths)} widths")
    if any(type(w) is not int or w < 1 for w in widths):
        raise WinnowError(f"config.json: the width of layer {layer} must be whole numbers of at least 1, not {width}")
    return widths
