"""What integration tests share."""

import os

import pytest

from tests.integration.ranks import run_ranks


@pytest.fixture(scope="module", autouse=True)
def environment():
    """An engine in this process sets variables, and no other file's tests or runs may see them."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="module")
def folder(request, tmp_path_factory):
    """Where the module's learners find the model that its `make_model` saves, and write what they write."""
    folder = tmp_path_factory.mktemp(request.module.__name__)
    request.module.make_model(folder)
    return folder


@pytest.fixture(scope="module")
def one(request, folder):
    """What the module's `one_rank` found, on a single rank."""
    return run_ranks(request.module.one_rank, 1, folder)[0]


@pytest.fixture(scope="module")
def two(request, folder):
    """What the module's `two_ranks` found, on each of two ranks."""
    return run_ranks(request.module.two_ranks, 2, folder)
