"""No test can cut the power: waiting for a real disk would take most of the time and show nothing."""

import os

import pytest


@pytest.fixture(autouse=True)
def _no_wait_for_the_disk(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda file: None)
