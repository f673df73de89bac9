"""Thoughts and answers told apart."""

import pytest

from tasks.published.thought import split_thought


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("  indented = 1\n", ("", "  indented = 1\n", False)),
        ("<think>\nIs it 7?\n</think>\n\nIt is 8.", ("Is it 7?", "It is 8.", False)),
        ("<think>\n\n</think>\n\n    return 1\n", ("", "    return 1\n", False)),
        ("It may be 7.\n</think>\n\n8", ("It may be 7.", "8", False)),
        ("<think>\nIs it \\boxed{7}? Let me", ("Is it \\boxed{7}? Let me", "", True)),
        ("<think>\nIs it 7?</thi", ("Is it 7?</thi", "", True)),
        ("<think>a <think>b</think>c", ("a\nb", "c", False)),
        ("<think>a</think>It is 8.\n</think>", ("a", "It is 8.\n", False)),
        ("<think>a</think>\n</think>\n8", ("a", "8", False)),
        ("8\n<think>or 9", ("or 9", "8\n", True)),
        ("<think>a</think>8, no, <think>b</think>9", ("a\nb", "8, no, 9", False)),
        ("x = t.split('</think>')[0]\ny = '<think>'", ("", "x = t.split('</think>')[0]\ny = '<think>'", False)),
        ("[THINK]a[/THINK]8", ("a", "8", False)),
        ("<seed:think>a</seed:think>8", ("a", "8", False)),
        (
            "<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>final<|message|>8",
            ("a", "8", False),
        ),
        ("<|channel|>final<|message|>8", ("", "8", False)),
        ("<|channel|>analysis<|message|>a 9", ("a 9", "", True)),
        ("<think>a", ("a", "", True)),
        ("", ("", "", False)),
    ],
)
def test_thought_answer_and_whether_it_was_cut(text: str, expected: tuple[str, str, bool]) -> None:
    assert split_thought(text) == expected
