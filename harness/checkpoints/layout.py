"""The compact layout: what is stored of every MoE layer, and the section of config.json that says so.

A *plain* checkpoint is what stock transformers loads. A *compact* one stores every merged expert once, and may have
another number of experts and other widths in each layer; the section ``"winnow"`` of its config.json describes it
(``width``: one number for all experts of the layer, or in a *ragged* layer one for each; ``route``: the stored expert
of each stored router row)::

    {"version": 1, "layers": {"0": {"experts": 3, "width": 768, "route": [0, 1, 0, 2]},
                              "1": {"experts": 2, "width": [768, 512], "route": [0, 0, 1, 0]}, ...}}

Constants and low-rank maps that stand for experts (``harness.checkpoints.standins``) are counted in ``constants`` and
listed in ``low_rank``, as ``[{"rank": 16, "base": null, "shift": true}, ...]``; in ``route`` they come behind the
experts, first the constants.

A second way to say it is that of vLLM's main branch (``layout=vllm_constants``; read, not run there): the config.json
of the uncompressed model with a section ``"approximate_experts": {"0": [1, 6], ...}``. These experts of a layer are
constants, of a tensor ``<experts path>.N.approx_value`` (H,) each; the others keep their old numbers, and the router
all of its rows.

The other keys of config.json stay as they were, so that stock transformers refuses it for its shapes. Only this file
knows the keys of the sections.
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from harness.errors import WinnowError
from harness.families.family import Family

_SECTION, _VERSION, APPROXIMATE = "winnow", 1, "approximate_experts"


@dataclass(frozen=True)
class LowRankLayout:
    """A map of ``rank``, added to what the stored expert ``base`` computes, if any; ``shift``: it has one."""

    rank: int
    base: int | None = None
    shift: bool = False


@dataclass(frozen=True)
class LayerLayout:
    """What is stored of one MoE layer: expert e has ``widths[e]`` channels, router row r leads to ``route[r]``.

    That counts the experts, then the ``constants``, then the maps of ``low_rank``. ``kept``: the old numbers by which
    experts are named where constants have the others, in the layout of vLLM; empty: experts are numbered as they come.
    """

    widths: tuple[int, ...]
    route: tuple[int, ...]
    constants: int = 0
    low_rank: tuple[LowRankLayout, ...] = ()
    kept: tuple[int, ...] = ()

    @property
    def numbers(self) -> tuple[int, ...]:
        """Those in the experts' names."""
        return self.kept or tuple(range(self.experts))

    @property
    def approximated(self) -> tuple[int, ...]:
        """The old numbers of what constants stand for, in the layout of vLLM."""
        return tuple(sorted(set(range(self.rows)) - set(self.kept))) if self.kept else ()

    @property
    def experts(self) -> int:
        return len(self.widths)

    @property
    def has_standins(self) -> bool:
        """Something else than an expert is stored."""
        return bool(self.constants or self.low_rank)

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
        return replace(self, widths=(width,) * self.experts)

    @property
    def is_direct(self) -> bool:
        """Row r leads to expert r: an ordinary MoE layer."""
        return not self.has_standins and self.route == tuple(range(self.experts))


def is_compact(config: Mapping[str, Any]) -> bool:
    return _SECTION in config or APPROXIMATE in config


def approximated_layout(widths: tuple[int, ...], approximated: Iterable[int]) -> LayerLayout:
    """That of vLLM for a layer of experts of ``widths``, of which those numbered ``approximated`` are constants."""
    gone = sorted(set(approximated))
    kept = tuple(old for old in range(len(widths)) if old not in gone)
    place = {old: new for new, old in enumerate((*kept, *gone))}
    route = tuple(place[old] for old in range(len(widths)))
    return LayerLayout(tuple(widths[old] for old in kept), route, len(gone), kept=kept if gone else ())


def with_layouts(config: Mapping[str, Any], layouts: Mapping[int, LayerLayout]) -> dict[str, Any]:
    """The config.json of a compact checkpoint that stores every MoE layer as ``layouts`` has it."""
    if any(layout.kept for layout in layouts.values()):
        gone = {str(layer): list(layout.approximated) for layer, layout in layouts.items() if layout.kept}
        return {**config, APPROXIMATE: gone}
    layers = {
        str(layer): {
            "experts": layout.experts,
            "width": list(layout.widths) if layout.is_ragged else layout.width,
            "route": list(layout.route),
            **({"constants": layout.constants} if layout.constants else {}),
            **({"low_rank": [asdict(one) for one in layout.low_rank]} if layout.low_rank else {}),
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
        if APPROXIMATE in config:
            return _approximated_layouts(config, family, moe_layers)
        section = config[_SECTION]
        if section["version"] != _VERSION:
            raise WinnowError(f"config.json: layout version {section['version']} is newer than this winnow")
        layouts = {layer: _stored_layout(layer, section["layers"][str(layer)]) for layer in moe_layers}
    except (KeyError, TypeError, ValueError) as error:
        raise WinnowError(f"config.json does not describe a complete model: {error!r}") from error
    for layer, layout in layouts.items():
        bases = {one.base for one in layout.low_rank} - {None}
        stored = layout.experts + layout.constants + len(layout.low_rank)
        if (
            not layout.experts
            or not bases <= set(range(layout.experts))
            or (set(layout.route) | bases != set(range(stored)))
        ):
            beside = " and what stands for others" if layout.has_standins else ""
            raise WinnowError(
                f"config.json: the route of layer {layer} does not fit its {layout.experts} experts{beside}"
            )
    return layouts


def _approximated_layouts(
    config: Mapping[str, Any], family: Family, moe_layers: Iterable[int]
) -> dict[int, LayerLayout]:
    told, widths = config[APPROXIMATE], (family.width(config),) * family.num_experts(config)
    layers = list(moe_layers)
    if _SECTION in config or not isinstance(told, Mapping) or not set(told) <= set(map(str, layers)):
        raise WinnowError(f"config.json: {APPROXIMATE} must name MoE layers, and be the only compact layout")
    for layer, gone in told.items():
        if (
            not isinstance(gone, list)
            or not set(gone) < set(range(len(widths)))
            or any(type(old) is not int for old in gone)
            or len(set(gone)) < len(gone)
        ):
            raise WinnowError(
                f"config.json: {APPROXIMATE} of layer {layer} must list some of its {len(widths)} experts, each once"
            )
    return {layer: approximated_layout(widths, told.get(str(layer), [])) for layer in layers}


def _stored_layout(layer: int, stored: Mapping[str, Any]) -> LayerLayout:
    experts, width = int(stored["experts"]), stored["width"]
    widths = tuple(width) if isinstance(width, list) else (int(width),) * experts
    if len(widths) != experts:
        raise WinnowError(f"config.json: layer {layer} has {experts} experts, but {len(widths)} widths")
    if any(type(w) is not int or w < 1 for w in widths):
        raise WinnowError(f"config.json: the width of layer {layer} must be whole numbers of at least 1, not {width}")
    constants, maps = stored.get("constants", 0), stored.get("low_rank", [])
    low_rank = tuple(LowRankLayout(one["rank"], one["base"], one["shift"]) for one in maps)
    if (
        any(type(one.rank) is not int or one.rank < 1 for one in low_rank)
        or type(constants) is not int
        or constants < 0
    ):
        raise WinnowError(f"config.json: the constants or low-rank maps of layer {layer} are no numbers")
    return LayerLayout(widths, tuple(stored["route"]), constants, low_rank)
