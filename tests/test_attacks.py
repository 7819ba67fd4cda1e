"""The attacks of dev/attacks.py that take no time, at every level of isolation that there is."""

import os
import sys

import pytest

from dev.attacks import FORGERIES, PROGRAMS, attack, levels

SLOW = ("ignored", "blocked", "expression", "power", "pages", "pipes", "sparse", "say", "too long", "never ends")
QUICK = {name: code for name, code in PROGRAMS.items() if not any(word in name for word in SLOW)}
CHEAP = ("class", "ahead", "no kind", "error", "metaclass", "interpreters", "patched", "in place")
QUICK_FORGERIES = {name: code for name, code in FORGERIES.items() if any(word in name for word in CHEAP)}

pytestmark = pytest.mark.skipif(sys.platform != "linux" or not os.path.isdir("/dev/shm"), reason="Linux only")


@pytest.mark.parametrize(("name", "namespaces", "audit"), levels())
def test_nothing_is_read_reached_or_left(name, namespaces, audit):
    assert attack(namespaces, audit, {} if audit else QUICK, {}) == []


def test_nothing_passes_without_being_right():
    assert attack(True, True, {}, QUICK_FORGERIES) == []
