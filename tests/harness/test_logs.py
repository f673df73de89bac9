"""Lines that many cells of a sweep say are told once a sweep, and again in the next one."""

import logging

import pytest

from harness.logs import each_line_once


def test_a_line_is_said_once_meanwhile(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    log = logging.getLogger("harness.somewhere")
    for _ in range(2):
        with each_line_once("harness.somewhere"):
            for number in (1, 1, 2):
                log.info("number %d", number)
    log.info("number %d", 2)
    assert caplog.messages == ["number 1", "number 2", "number 1", "number 2", "number 2"]
