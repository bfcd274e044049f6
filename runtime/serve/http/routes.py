"""All routes of the HTTP door, with who may call them."""

from __future__ import annotations

from ...trust.identity import Role
from .app import ANY, WORK, HttpRoute, health, metrics
from .chat import chat_completions
from .completions import completions
from .embeddings import embeddings
from .models import get_model, list_models
from .responses import responses

ROUTES = (
    HttpRoute("GET", "/health", ANY, health),
    HttpRoute("GET", "/metrics", frozenset({Role.MONITOR}), metrics),
    HttpRoute("GET", "/v1/models", ANY, list_models),
    HttpRoute("GET", "/v1/models/{name:path}", ANY, get_model),
    HttpRoute("POST", "/v1/chat/completions", WORK, chat_completions),
    HttpRoute("POST", "/v1/completions", WORK, completions),
    HttpRoute("POST", "/v1/responses", WORK, responses),
    HttpRoute("POST", "/v1/embeddings", WORK, embeddings),
)
