"""OpenAI's own client, unchanged, and the own client beside it, at one engine whose template takes tools."""

from __future__ import annotations

import openai
import pytest
from helpers.models import write_tokenizer
from helpers.openai_door import TEMPLATE
from helpers.servers import serving_http
from helpers.structures import structure_engine
from motet.runtime.client.client import Client
from motet.runtime.serve.local import serve_engine
from motet.runtime.text.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tools")
    write_tokenizer(path)
    (path / "chat_template.jinja").write_text(TEMPLATE)
    return Tokenizer.from_dir(path)


@pytest.fixture(scope="module")
def engine(tokenizer):
    with structure_engine(tokenizer) as engine:
        yield engine


@pytest.fixture(scope="module")
def client(engine):
    with serving_http(engine) as (address, _service):
        yield openai.OpenAI(base_url=f"http://{address}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def own(engine):
    with serve_engine(engine) as address, Client(address) as client:
        yield client
