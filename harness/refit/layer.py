"""The refit of one layer, from what goes through its intact experts token by token.

T tokens, k top-k, H hidden size, d channels of a new expert. The objectives, with gate values g of the intact router,
V the down projection of a new expert and z = gate * (what goes into it):

- ``routed``: tokens that choose a member of the expert's group, gate the sum of their g over the group; V z is to be
  the sum of g_j f_j(x) over the group. An expert that is one old expert as it was stays.
- ``all_tokens``: every token, gate 1; V z is to be the weighted sum of the sources' outputs (MergeMoE).
- ``joint``: the router that the plan leaves; the sum of V z over all experts is to be the output of the intact ones.

What an expert gives besides V z (a bias, a low-rank map) is taken off first. Constants and low-rank maps are not
refitted; where a map is added to an expert that stays, and is fitted jointly, the two go on sharing it.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from harness.calibration.batches import evenly_spaced
from harness.contracts.plan import LayerPlan, NewExpert, Source
from harness.contracts.recovery import Fit
from harness.errors import WinnowError
from harness.refit.experts import Choices, Expert, Experts, mixture, rows
from harness.refit.solve import factor, relative_error, ridge, step

_SETTLED = 1e-7  # of the relative error: sweeps that change it by less are the last


@dataclass(frozen=True)
class Tokens:
    """What the intact experts are given: ``hidden`` (T, H), ``choices``; ``held_out`` (T,) are not fitted to."""

    hidden: Tensor
    choices: Choices
    held_out: Tensor


@dataclass(frozen=True)
class Fitted:
    """The layer refitted, and the relative squared errors of its output, before the first fit and behind each: on the
    text that was fitted to, and on that which was held out (None without any)."""

    plan: LayerPlan
    calibration: list[float]
    heldout: list[float] | None


def fit_layer(
    plan: LayerPlan, fits: Iterable[Fit], experts: Experts, tokens: Tokens, left: Choices, all_tokens: int | None = None
) -> Fitted:
    """One fit after the other, each from what the one before has left. ``left`` is what tokens choose of the new
    experts; ``all_tokens`` of them, evenly spaced, stand for all where that is the objective (None: all do).

    Raises WinnowError where sums are not finite or singular.
    """
    wanted = mixture([_whole(expert) for expert in range(len(plan.route))], experts, tokens.choices, tokens.hidden)
    found = mixture(plan.experts, experts, left, tokens.hidden)
    fitted = Fitted(plan, [], [] if tokens.held_out.any() else None)
    _measure(fitted, found, wanted, tokens.held_out)
    for fit in fits:
        try:
            if fit.name == "joint":
                made = _joint(plan, fit, experts, tokens, left, wanted - found)
            else:
                one = _routed if fit.name == "routed" else partial(_all_tokens, limit=all_tokens)
                made = [one(plan, place, fit, experts, tokens) for place in range(len(plan.experts))]
        except WinnowError as error:
            raise WinnowError(f"refit={fit.name}, layer {plan.layer}: {error}") from None
        plan = replace(plan, experts=tuple(made))
        found = mixture(plan.experts, experts, left, tokens.hidden)
        _measure(fitted, found, wanted, tokens.held_out)
    return replace(fitted, plan=plan)


def _measure(fitted: Fitted, found: Tensor, wanted: Tensor, held_out: Tensor) -> None:
    fitted.calibration.append(relative_error(found[~held_out], wanted[~held_out]))
    if fitted.heldout is not None:
        fitted.heldout.append(relative_error(found[held_out], wanted[held_out]))


def _routed(plan: LayerPlan, place: int, fit: Fit, experts: Experts, tokens: Tokens) -> NewExpert:
    new = plan.experts[place]
    members = {row for row, to in enumerate(plan.route) if to == place} | {source.expert for source in new.sources}
    if not _can_be_fitted(new) or (len(members) == 1 and new.is_whole):
        return new
    group = tokens.choices.led([0 if row in members else None for row in range(len(plan.route))])
    chosen, gates = group.of(0, ~tokens.held_out)
    expert = experts.new(new)

    def triples() -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        for some, x in rows(tokens.hidden, chosen, experts):
            here = Choices(tokens.choices.expert[chosen[some]], tokens.choices.gate[chosen[some]])
            wanted = torch.zeros_like(x)
            for member in sorted(members):
                which, gate = here.of(member)
                if len(which):
                    wanted.index_add_(0, which, gate.unsqueeze(1).to(x.dtype) * experts.old(member).output(x[which]))
            yield gates[some].to(x.dtype), wanted, x

    return _solved(new, expert, fit, experts, triples())


def _all_tokens(
    plan: LayerPlan, place: int, fit: Fit, experts: Experts, tokens: Tokens, limit: int | None
) -> NewExpert:
    new = plan.experts[place]
    if not _can_be_fitted(new) or new.is_whole:
        return new
    every = torch.nonzero(~tokens.held_out).squeeze(1)
    chosen = every[evenly_spaced(len(every), limit).to(every.device)]

    def triples() -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        for _, x in rows(tokens.hidden, chosen, experts):
            wanted = torch.zeros_like(x)
            for source in new.sources:
                wanted.add_(experts.old(source.expert).output(x), alpha=source.weight)
            yield torch.ones(len(x), dtype=x.dtype, device=x.device), wanted, x

    return _solved(new, experts.new(new), fit, experts, triples())


def _solved(
    new: NewExpert, expert: Expert, fit: Fit, experts: Experts, triples: Iterable[tuple[Tensor, Tensor, Tensor]]
) -> NewExpert:
    """``triples`` are gates (n,), what gate times output is to be (n, H), and the tokens (n, H)."""
    assert expert.down is not None
    prior = expert.down.double()
    gram, cross = prior.new_zeros(prior.shape[1], prior.shape[1]), torch.zeros_like(prior)
    for gate, wanted, x in triples:
        z, rest = _weighted(expert, gate, x), expert.rest(x)
        target = wanted if rest is None else wanted - gate.unsqueeze(1) * rest
        gram += z.T @ z
        cross += target.double().T @ z
    return replace(new, down=experts.array(ridge(gram, cross, prior, fit.alpha)))


def _joint(
    plan: LayerPlan, fit: Fit, experts: Experts, tokens: Tokens, left: Choices, missing: Tensor
) -> list[NewExpert]:
    """Gauss-Seidel: of one expert after the other the best V while the others stay, until the error settles.

    ``missing`` (T, H) is what the layer's output lacks; it is brought up to date.
    """
    free = [place for place, new in enumerate(plan.experts) if _can_be_fitted(new)]
    made = {place: experts.new(plan.experts[place]) for place in free}
    bases = _bases(plan)
    shared = left.led(bases)
    chosen = {place: shared.of(place, ~tokens.held_out) for place in free}

    def weighted(place: int) -> Iterator[tuple[Tensor, Tensor]]:
        ids, gates = chosen[place]
        for some, x in rows(tokens.hidden, ids, experts):
            yield ids[some], _weighted(made[place], gates[some].to(x.dtype), x)

    prior = {place: _down(made[place]).double() for place in free}
    grams, lowers = {}, {}
    for place in free:
        width = prior[place].shape[1]
        grams[place] = sum((z.T @ z for _, z in weighted(place)), prior[place].new_zeros(width, width))
        lowers[place] = factor(grams[place], fit.alpha)
    now = dict(prior)
    missing = missing.double()
    fitted_to = ~tokens.held_out
    energy = before = float(missing[fitted_to].square().sum())
    for _ in range(fit.sweeps):
        for place in free:
            gradient = torch.zeros_like(prior[place])
            for ids, z in weighted(place):
                gradient += missing[ids].T @ z
            # the best V less the prior, of what the others leave: missing + now z
            best = step(lowers[place], gradient + (now[place] - prior[place]) @ grams[place])
            change = prior[place] + best - now[place]
            now[place] = now[place] + change
            for ids, z in weighted(place):
                missing.index_add_(0, ids, z @ change.T, alpha=-1)
        after = float(missing[fitted_to].square().sum())
        if abs(before - after) <= _SETTLED * energy:
            break
        before = after
    fits = {place: experts.array(now[place]) for place in free}
    return [replace(new, down=fits.get(bases[place], new.down)) for place, new in enumerate(plan.experts)]


def _bases(plan: LayerPlan) -> list[int]:
    """Of each expert the one that it is fitted with: itself, or that which its low-rank map is added to, and which is
    stored once for both."""
    bare = [replace(new, low_rank=None) for new in plan.experts]
    return [
        plan.experts.index(bare[place]) if new.low_rank is not None and bare[place] in plan.experts else place
        for place, new in enumerate(plan.experts)
    ]


def _weighted(expert: Expert, gate: Tensor, x: Tensor) -> Tensor:
    """(n, d) float64: gate times what goes into the down projection."""
    return gate.double().unsqueeze(1) * expert.hidden(x).double()


def _down(expert: Expert) -> Tensor:
    assert expert.down is not None
    return expert.down


def _can_be_fitted(new: NewExpert) -> bool:
    return bool(new.sources) and new.low_rank is None


def _whole(expert: int) -> NewExpert:
    return NewExpert((Source(expert),))
