from itertools import product

from reports.figures.palette import COLOURS, MARKERS, looks


def test_a_method_looks_the_same_whatever_is_shown_beside_it():
    alone, among = looks(["reap"]), looks(["frequency", "hc_smoe", "own_method", "reap", "reap (scope=global)"])
    assert alone["reap"] == among["reap"]
    assert among["reap (scope=global)"][0] == among["reap"][0]
    assert len(set(among.values())) == 5


def test_no_two_look_alike_as_long_as_there_are_looks_left():
    many = looks([f"method_{number}" for number in range(len(COLOURS) * len(MARKERS))])
    assert set(many.values()) == set(product(COLOURS, MARKERS))
    assert len(looks([f"reap (k={number})" for number in range(70)])) == 70
