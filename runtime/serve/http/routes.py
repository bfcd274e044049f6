"""All routes of the HTTP door, with who may call them."""

from __future__ import annotations

from ...trust.identity import Role
from .app import ANY, WORK, HttpRoute, health, metrics
from .batches import (
    cancel_batch,
    create_batch,
    delete_file,
    file_content,
    get_batch,
    get_file,
    list_batches,
    list_files,
    upload_file,
)
from .chat import chat_completions
from .completions import completions
from .documents import classify, summarise
from .embeddings import embeddings
from .models import get_model, list_models
from .responses import responses

_BATCH = frozenset({Role.BATCH})

ROUTES = (
    HttpRoute("GET", "/health", ANY, health),
    HttpRoute("GET", "/metrics", frozenset({Role.MONITOR}), metrics),
    HttpRoute("GET", "/v1/models", ANY, list_models),
    HttpRoute("GET", "/v1/models/{name:path}", ANY, get_model),
    HttpRoute("POST", "/v1/chat/completions", WORK, chat_completions),
    HttpRoute("POST", "/v1/completions", WORK, completions),
    HttpRoute("POST", "/v1/responses", WORK, responses),
    HttpRoute("POST", "/v1/embeddings", WORK, embeddings),
    HttpRoute("POST", "/v1/summarise", WORK, summarise),
    HttpRoute("POST", "/v1/classify", WORK, classify),
    HttpRoute("POST", "/v1/files", _BATCH, upload_file),
    HttpRoute("GET", "/v1/files", _BATCH, list_files),
    HttpRoute("GET", "/v1/files/{id}", _BATCH, get_file),
    HttpRoute("DELETE", "/v1/files/{id}", _BATCH, delete_file),
    HttpRoute("GET", "/v1/files/{id}/content", _BATCH, file_content),
    HttpRoute("POST", "/v1/batches", _BATCH, create_batch),
    HttpRoute("GET", "/v1/batches", _BATCH, list_batches, frozenset({"limit", "after"})),
    HttpRoute("GET", "/v1/batches/{id}", _BATCH, get_batch),
    HttpRoute("POST", "/v1/batches/{id}/cancel", _BATCH, cancel_batch),
)
