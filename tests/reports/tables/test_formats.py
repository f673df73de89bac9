"""Names from outside in tables of every kind."""

import re

import pytest

from reports.tables.formats import Table, in_csv, in_markdown, to_latex, to_markdown


def test_nothing_in_a_latex_table_is_taken_for_a_command():
    text = to_latex(Table("T", ["a", "b"], [[r"x\y", "{$1~2^3} < 10^6"]], "p‖q"))
    assert r"x\textbackslash{}y & \{\$1\textasciitilde{}2\textasciicircum{}3\} $<$ 10$^6$ \\" in text
    assert r"p$\Vert$q" in text


def test_names_from_outside_break_no_markdown_table():
    header = ["ratio", "a|b", "<b>c"]
    table = Table(
        "T", header, [["0.5", "x|y\nz", "<img src=x onerror=alert(1)>"], ["1", "[a](javascript:x)", "![p](u)"]], "n"
    )
    lines = to_markdown(table).splitlines()
    assert [len(re.findall(r"(?<!\\)\|", line)) for line in lines[:4]] == [4, 4, 4, 4]
    assert lines[2] == r"| 0.5 | x\|y z | &lt;img src=x onerror=alert(1)> |"
    assert lines[3] == r"| 1 | [a]\(javascript:x) | ![p]\(u) |"
    assert lines[0] == r"| ratio | a\|b | &lt;b>c |"


@pytest.mark.parametrize("text", ["</script><script>x", "<!-- x", "<?php", "<A href=x>"])
def test_no_tag_begins_in_markdown(text):
    assert "<" not in in_markdown(f"a {text}")


def test_what_is_meant_stays_in_markdown():
    text = "61.2 [57.0, 65.1], p < 0.001, **bold**, `winnow-report migrate`, reap_coverage, 1 <2"
    assert in_markdown(text) == text


def test_a_line_break_ends_no_latex_row():
    assert "a b & c" in to_latex(Table("T", ["x", "y"], [["a\n\nb", "c"]], "n\n\no"))


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@x", "\t=x", "\r=x", "\n=x", "  =x"])
def test_no_name_is_a_formula_in_csv(text):
    found = in_csv(text)
    assert found.startswith("'") and found[1:] == text.strip()


@pytest.mark.parametrize("text", ["reap", "a=b", "hc_smoe (linkage=ward)", ""])
def test_other_names_stay_in_csv(text):
    assert in_csv(text) == text
