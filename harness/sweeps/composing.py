"""The configurations of all cells of a sweep, without composing each of them from its files.

Hydra takes some 70 ms for one configuration. The cells of a sweep have few different options of each group between
them, so what an option writes into the configuration is composed once, and put together for every cell. Groups that
write into the same part (``allocation`` writes into that of ``method``) are composed together. Of the first and the
last cell the result is compared with Hydra's own.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict

# Overrides of groups, as they are written; and what they make: top-level key -> its part, with its interpolations.
Lines = tuple[str, ...]
Parts = Mapping[str, Any]


def compose_all(loader: ConfigLoader, jobs: Sequence[Sequence[str]]) -> list[DictConfig]:
    """The configuration of each job, of which ``jobs`` has the overrides; the node of Hydra itself is left out.

    Raises what Hydra raises for the first job that cannot be composed.
    """

    def from_files(overrides: Sequence[str]) -> DictConfig:
        found = loader.load_configuration("config", list(overrides), RunMode.RUN)
        with open_dict(found):
            del found["hydra"]
        return found

    def parts_of(lines: Lines) -> Parts:
        return _plain(from_files(lines))

    parser = OverridesParser.create(config_loader=loader)
    parsed = [[o for o in parser.parse_overrides(list(job)) if not o.is_hydra_override()] for job in jobs]
    keys = {override.key_or_group for job in parsed for override in job}
    groups = {key for key in keys if loader.get_group_options(key)}
    lines = [tuple(str(o.input_line) for o in job if o.key_or_group in groups) for job in parsed]
    values = [[o for o in job if o.key_or_group not in groups] for job in parsed]
    found = [_with_values(parts, own) for parts, own in zip(_joined(parts_of, lines), values, strict=True)]
    for place in sorted({0, len(jobs) - 1}) if jobs else ():
        if _plain(found[place]) != _plain(from_files(jobs[place])):
            return [from_files(job) for job in jobs]
    return found


def _plain(config: DictConfig) -> dict[str, Any]:
    plain: Any = OmegaConf.to_container(config, resolve=False)
    return plain


def _with_values(parts: Parts, overrides: Sequence[Override]) -> DictConfig:
    config = OmegaConf.create(dict(parts))
    OmegaConf.set_struct(config, True)
    ConfigLoaderImpl._apply_overrides_to_config(list(overrides), config)
    return config


def _joined(parts_of: Callable[[Lines], Parts], jobs: Sequence[Lines]) -> Iterator[Parts]:
    """The parts of each job, from ``parts_of`` of as few combinations of its lines as possible."""
    everywhere = tuple(line for line in jobs[0] if all(line in job for job in jobs)) if jobs else ()
    base = parts_of(everywhere)
    own = [tuple(line for line in job if line not in everywhere) for job in jobs]
    touched = {line: _changed(base, parts_of((*everywhere, line))) for line in dict.fromkeys(sum(own, ()))}
    clusters = _clusters(touched)
    known: dict[Lines, Parts] = {}
    for job in own:
        parts = dict(base)
        for lines_of_cluster, keys in clusters:
            lines = tuple(line for line in job if line in lines_of_cluster)
            if lines and lines not in known:
                known[lines] = parts_of((*everywhere, *lines))
            if lines:
                parts |= {key: known[lines][key] for key in keys if key in known[lines]}
        yield parts


def _changed(base: Parts, other: Parts) -> frozenset[str]:
    return frozenset(key for key in base.keys() | other.keys() if base.get(key) != other.get(key))


def _clusters(touched: Mapping[str, frozenset[str]]) -> list[tuple[set[str], set[str]]]:
    """Lines that write into common parts, and these parts; no two of the results have a part in common."""
    clusters: list[tuple[set[str], set[str]]] = []
    for line, keys in touched.items():
        joined_lines, joined_keys = {line}, set(keys)
        for lines, others in list(clusters):
            if others & joined_keys:
                joined_lines |= lines
                joined_keys |= others
                clusters.remove((lines, others))
        clusters.append((joined_lines, joined_keys))
    return clusters
