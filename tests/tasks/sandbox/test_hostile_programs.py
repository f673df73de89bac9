"""The programs of ``tests.attack.hostile_programs``, one a test."""

import sys

import pytest

from tests.attack.hostile_programs import ATTACKS

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the layers are those of Linux")


@pytest.mark.parametrize("name", ATTACKS)
def test_what_must_come_of_it_comes(name: str) -> None:
    assert ATTACKS[name]()
