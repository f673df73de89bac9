"""Answers in boxes, of solutions and of what models write."""

from harness.data.boxed import answer_of, boxes, last_boxed


def test_the_last_box_that_closes():
    assert last_boxed("\\boxed{a{b}c} \\fbox{d} \\boxed {e") == "d"
    assert last_boxed("\\boxed{1} and \\boxed { \\frac{1}{2} }") == " \\frac{1}{2} "
    assert last_boxed("\\boxed{}") is None
    assert last_boxed("\\boxed{5} \\boxed{} \\boxed{...} \\boxed{your answer}") == "5"
    assert last_boxed("\\boxed{\\boxed{5}}") == "5" and last_boxed("\\boxed{so \\boxed{5}}") == "5"
    assert last_boxed("\\boxed{5 \\boxed{}}") == "5 "
    assert last_boxed("\\boxed{\\boxed{3} + \\boxed{4}}") == "{3} + {4}"
    assert last_boxed("\\boxed{\\{1, 2\\}} and \\boxed{\\{3") == "\\{1, 2\\}"
    assert boxes("\\boxed{1} {\\fbox{2}} } \\boxed{3") == ["1", "2"]
    assert last_boxed("\\boxed{" * 20_000 + "5" + "}" * 20_000).count("5") == 1
    assert last_boxed("a box") is None
    assert last_boxed("\\boxed 7") is None


def test_the_answer_of_a_solution():
    assert answer_of(r"\boxed{\text{(A)}}") == r"\text{(A)}"
    assert answer_of(r"so $\boxed 7$ it is") == "7"
    assert answer_of(r"\fbox{3} after \boxed{2}") == "2"
    assert answer_of(r"\boxed{ 5}") == " 5"
    assert answer_of(r"\boxed{1} and \boxed{unclosed") == ""
    assert answer_of("none, though a box is named") == ""
