"""Which collector collects which statistics: the one place that knows them all."""

from collections.abc import Callable

from harness.calibration.collected import Part
from harness.calibration.collectors import coverage, pairs, router
from harness.calibration.collectors.all_tokens import OutputMean, input_gram
from harness.calibration.collectors.collector import Collector, Sum, Term
from harness.calibration.collectors.events import AllTokens, PairActivations, PairOutputs, RoutedPairs, RouterOutput
from harness.calibration.collectors.released import ReleasedActivation, ReleasedAttribution
from harness.calibration.collectors.samples import SampledTokens
from harness.calibration.fused_experts import FusedExperts

_SUMS: dict[str, tuple[type, Term]] = {
    "gate_sum": (RoutedPairs, pairs.gate_sum),
    "router_score_sum": (RouterOutput, router.score_sum),
    "top1_frequency": (RouterOutput, router.top1_frequency),
    "top1_score_sum": (RouterOutput, router.top1_score_sum),
    "ean_sum": (PairOutputs, pairs.ean_sum),
    "weighted_ean_sum": (PairOutputs, pairs.weighted_ean_sum),
    "output_sum": (PairOutputs, pairs.output_sum),
    "output_square_sum": (PairOutputs, pairs.output_square_sum),
    "gate_square_sum": (RoutedPairs, pairs.gate_square_sum),
    "gate_square_output_sum": (PairOutputs, pairs.gate_square_output_sum),
    "difference_square_sum": (PairOutputs, pairs.difference_square_sum),
    "input_sum": (PairActivations, pairs.input_sum),
    "channel_sum": (PairActivations, pairs.channel_sum),
    "input_gram": (AllTokens, input_gram),
    "channel_square_sum": (PairActivations, coverage.channel_square_sum),
    "input_square_sum": (PairActivations, coverage.input_square_sum),
}
_ALONE: dict[str, Callable[[FusedExperts], Collector]] = {
    "max_activation": pairs.MaxActivation,
    "output_mean": OutputMean,
    "attribution_sum": coverage.Attribution,
    "channel_saliency_sum": coverage.ChannelSaliency,
    "released_attribution": ReleasedAttribution,
    "released_activation": ReleasedActivation,
}


def collectors_for(
    names: frozenset[str], sources: int, part: Part, vocabulary: int, experts: FusedExperts
) -> list[Collector]:
    """Collectors of the statistics ``names`` and of the usage by source of text, from which ``frequency`` comes.

    ``part`` is the place of this pass in the whole corpus; texts come from ``sources`` sources. Ids of tokens are below
    ``vocabulary``.
    """
    found: list[Collector] = [pairs.Usage(experts, sources)]
    found += [Sum(name, *_SUMS[name], experts) for name in _SUMS if name in names]
    found += [_ALONE[name](experts) for name in _ALONE if name in names]
    if pairs.TokenIds.name in names:
        found.append(pairs.TokenIds(experts, vocabulary))
    if grams := names & router.RouterGrams.provides:
        found.append(router.RouterGrams(grams, experts))
    if samples := names & SampledTokens.provides:
        found.append(SampledTokens(samples, experts, part))
    return found
