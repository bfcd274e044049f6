"""An engine over the fake backend, and a server of it."""

from __future__ import annotations

import pytest
from helpers.fake_backend import FakeBackend, make_engine
from motet.runtime.serve.local import serve_engine


@pytest.fixture
def backend():
    return FakeBackend()


@pytest.fixture
def engine(tokenizer, backend):
    with make_engine(tokenizer, backend) as engine:
        yield engine


@pytest.fixture
def address(engine):
    with serve_engine(engine) as address:
        yield address
