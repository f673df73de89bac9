"""Words in columns: rows of unequal length, a long last word, a rule under the first row."""

from harness.text import aligned


def test_columns_are_as_wide_as_their_widest_word():
    assert aligned([("a", "bb", "c"), ("aaa", "b", "cc")]) == "a    bb  c\naaa  b   cc"


def test_a_long_last_word_widens_no_column():
    rows = [("ratio", "experts", "bytes"), ("0.5", "refused: a long reason"), ("0.25", "6", "1,000")]
    assert aligned(rows) == "ratio  experts  bytes\n0.5    refused: a long reason\n0.25   6        1,000"


def test_the_rule_is_as_wide_as_each_column_and_no_line_ends_in_spaces():
    rows = [("set", "licence"), ("gsm8k", "MIT"), ("c4", "")]
    assert aligned(rows, rule=True) == "set    licence\n-----  -------\ngsm8k  MIT\nc4"
