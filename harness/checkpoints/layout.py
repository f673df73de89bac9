"""The compact layout: what is stored of every MoE layer, and the section of config.json that says so.

A *plain* checkpoint is what stock transformers loads. A *compact* one stores every merged expert once, and may have
another number of experts and other widths in each layer; the section ``"winnow"`` of its config.json describes it
(``width``: one number for all experts of the layer, or in a *ragged* layer one for each; ``route``: the stored expert
of each stored router row)::

    {"version": 1, "layers": {"0": {"experts": 3, "width": 768, "route": [0, 1, 0, 2]},
                              "1": {"experts": 2, "width": [768, 512], "route": [0, 0, 1, 0]}, ...}}

The other keys of config.json stay as they were, so that stock transformers refuses it for its shapes. Only this file
knows the keys of the section.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from harness.errors import WinnowError
from harness.families.family import Family

_SECTION, _VERSION = "winnow", 1


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


def is_compact(config: Mapping[str, Any]) -> bool:
    return _SECTION in config


def with_layouts(config: Mapping[str, Any], layouts: Mapping[int, LayerLayout]) -> dict[str, Any]:
    """The config.json of a compact checkpoint that stores every MoE layer as ``layouts`` has it."""
    layers = {
        str(layer): {
            "experts": layout.experts,
            "width": list(layout.widths) if layout.is_ragged else layout.width,
            "route": list(layout.route),
        }
        for layer, layout in layouts.items()
    }
    return {**config, _SECTION: {"version": _VERSION, "layers": layers}}


def layer_layouts(config: Mapping[str, Any], family: Family) -> dict[int, LayerLayout]:
    """The layout of every MoE layer, plain or compact. Raises WinnowError for a broken config."""
    try:
        moe_layers = family.moe_layers(config)
        if not is_compact(config):
            count = family.num_experts(config)
            widths = (family.width(config),) * count
            return dict.fromkeys(moe_layers, LayerLayout(widths, tuple(range(count))))
        section = config[_SECTION]
        if section["version"] != _VERSION:
            raise WinnowError(f"config.json: layout version {section['version']} is newer than this winnow")
        layouts = {layer: _stored_layout(layer, section["layers"][str(layer)]) for layer in moe_layers}
    except (KeyError, TypeError, ValueError) as error:
        raise WinnowError(f"config.json does not describe a complete model: {error!r}") from error
    for layer, layout in layouts.items():
        if not layout.experts or set(layout.route) != set(range(layout.experts)):
            raise WinnowError(f"config.json: the route of layer {layer} does not fit its {layout.experts} experts")
    return layouts


def _stored_layout(layer: int, stored: Mapping[str, Any]) -> LayerLayout:
    experts, width = int(stored["experts"]), stored["width"]
    widths = tuple(width) if isinstance(width, list) else (int(width),) * experts
    if len(widths) != experts:
        raise WinnowError(f"config.json: layer {layer} has {experts} experts, but {len(widths)} widths")
    if any(type(w) is not int or w < 1 for w in widths):
        raise WinnowError(f"config.json: the width of layer {layer} must be whole numbers of at least 1, not {width}")
    return LayerLayout(widths, tuple(stored["route"]))
