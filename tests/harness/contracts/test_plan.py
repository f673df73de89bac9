"""Plans as data: stored and read back, and refused where they contradict themselves or do not fit a model."""

import json

import pytest

from harness.contracts.plan import CompressionPlan, LayerPlan, NewExpert, Source, identity, prune, validate
from harness.contracts.plan_files import load_plan, plan_from_json, plan_to_json
from harness.errors import WinnowError

MERGED = LayerPlan(
    3,
    (NewExpert((Source(0, 0.25), Source(2, 0.75, (2, 0, 1)))), NewExpert((Source(1),), (2, 0))),
    (0, 1, 0, None),
)


def plan_of(*experts: NewExpert, route: tuple[int | None, ...] = (0, 0, 0, 0)) -> CompressionPlan:
    return CompressionPlan((LayerPlan(3, experts, route),))


def test_a_plan_is_what_its_json_says(tmp_path):
    plan = CompressionPlan((identity(0, 4), prune(1, 4, [3, 1]), MERGED))
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(plan_to_json(plan)))
    assert load_plan(path) == plan
    validate(plan, num_experts=4, width=3)


WRONG = [
    (plan_of(NewExpert(())), "layer 3, new expert 0 has no source"),
    (plan_of(NewExpert((Source(4),))), "new expert 0: old expert 4 does not exist among 4"),
    (plan_of(NewExpert((Source(-1),))), "old expert -1 does not exist"),
    (plan_of(NewExpert((Source(1, float("inf")),))), "the weight of old expert 1 is inf"),
    (plan_of(NewExpert((Source(1, 1.0, (0, 0, 1)),))), "old expert 1 has no permutation of 3 channels"),
    (plan_of(NewExpert((Source(1),), ())), "no channel is kept, or one is kept twice"),
    (plan_of(NewExpert((Source(1),), (2, 2))), "no channel is kept, or one is kept twice"),
    (plan_of(NewExpert((Source(1),), (0, -1))), "a channel outside 0 to"),
    (plan_of(NewExpert((Source(1),)), route=(0, 1, 0, 0)), "the route must lead to every new expert"),
    (plan_of(NewExpert((Source(1),)), route=(None,) * 4), "the route must lead to every new expert"),
]


@pytest.mark.parametrize(("plan", "message"), WRONG)
def test_a_plan_that_contradicts_itself_is_refused_when_it_is_read(plan, message):
    for check in (lambda: validate(plan), lambda: plan_from_json(plan_to_json(plan))):
        with pytest.raises(WinnowError, match=message):
            check()


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (plan_of(NewExpert((Source(0),)), route=(0, 0)), "it routes 2 experts, but the model has 4"),
        (plan_of(NewExpert((Source(0, 1.0, (1, 0)),))), "old expert 0 has no permutation of 3 channels"),
        (plan_of(NewExpert((Source(0),), (0, 3))), "it keeps a channel outside 0 to 2"),
    ],
)
def test_a_plan_for_another_model_is_refused_where_the_model_is_known(plan, message):
    validate(plan)
    with pytest.raises(WinnowError, match=message):
        validate(plan, num_experts=4, width=3)


@pytest.mark.parametrize("data", [{}, {"layers": [{}]}, {"layers": 3}, {"layers": [{"layer": 0, "experts": 1}]}])
def test_what_is_no_plan_is_said_so(data):
    with pytest.raises(WinnowError, match="not a compression plan"):
        plan_from_json(data)
