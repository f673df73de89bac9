import pytest

from tasks.made.writing import WritingTask
from tasks.reference.items import evaluation_problems
from tests.tasks.scripted import ScriptedBackend

ITEMS = 15
PROBLEMS = {problem.prompt: problem for problem in evaluation_problems("writing", ITEMS, 0)}


def test_reference_stories_have_all_elements_and_form() -> None:
    backend = ScriptedBackend(lambda prompt: PROBLEMS[prompt].answer)
    result = WritingTask(items=ITEMS).run(backend)
    assert [(s.metric, s.value, s.n) for s in result.scores] == [
        ("elements", 1.0, ITEMS),
        ("form", 1.0, ITEMS),
    ]
    assert [sample.item for sample in result.samples] == [problem.id for problem in PROBLEMS.values()]
    problems = evaluation_problems("writing", 100, 0)
    assert not any(stop in problem.answer for problem in problems for stop in backend.stop)


def test_a_list_of_some_elements_earns_their_share_and_no_form() -> None:
    def write(prompt: str) -> str:
        elements = PROBLEMS[prompt].meta["elements"]
        return f"{elements['who']} {elements['where']}"

    elements, form = WritingTask(items=ITEMS).run(ScriptedBackend(write)).scores
    assert elements.value == pytest.approx(0.4, abs=0.1) and form.value == 0.0
    assert elements.low <= elements.value <= elements.high


def test_nothing_written_earns_nothing() -> None:
    assert [s.value for s in WritingTask(items=ITEMS).run(ScriptedBackend()).scores] == [0.0, 0.0]
