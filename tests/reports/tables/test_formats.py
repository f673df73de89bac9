from reports.tables.formats import Table, to_latex


def test_nothing_in_a_latex_table_is_taken_for_a_command():
    text = to_latex(Table("T", ["a", "b"], [[r"x\y", "{$1~2^3} < 10^6"]], "p‖q"))
    assert r"x\textbackslash{}y & \{\$1\textasciitilde{}2\textasciicircum{}3\} $<$ 10$^6$ \\" in text
    assert r"p$\Vert$q" in text
