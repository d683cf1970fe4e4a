"""What all integration tests share."""

import os

import pytest


@pytest.fixture(scope="module", autouse=True)
def environment():
    """An engine in this process sets variables, and no other file's tests or runs may see them."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)
