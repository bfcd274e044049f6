"""`Replica`: an engine on a machine of a Ray cluster; `PrefixRouter`: how Ray Serve chooses among them; `by_queued_tokens`: how
many there are."""

from __future__ import annotations

import itertools
import math
import threading
import time
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from ray import serve
from ray.serve.config import AutoscalingContext
from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from ..api.config import EngineConfig
from ..api.output import Output
from ..api.request import Ensemble, FinishReason, Owner, Request
from ..engine.engine import Engine
from ..engine.stats import EngineStats
from ..errors import MotetError
from ..serve.embeddings import embed_all
from ..serve.output_queue import Delivery, OutputQueue
from .routing import RUNNING_TOKENS, PrefixRouting, pack_keys

TOKENS_METRIC = "motet_queued_tokens"


class Replica:
    """Ray Serve makes one in each replica's process. Errors of ours are values here: Ray would wrap them."""

    def __init__(self, bundle: str, config: EngineConfig, orphaned_s: float) -> None:
        self._engine = Engine.from_bundle(Path(bundle), config)
        self._versions = itertools.count()
        self._heard, self._orphaned_s = time.monotonic(), orphaned_s  # when the server last asked
        threading.Thread(target=self._end_if_orphaned, name="motet-orphaned", daemon=True).start()

    def _end_if_orphaned(self) -> None:
        """A server that was killed has not ended its application, and nobody else would."""
        name = serve.get_replica_context().app_name
        while time.monotonic() - self._heard < self._orphaned_s:
            time.sleep(min(self._orphaned_s / 4, 10.0))
        serve.delete(name, _blocking=False)

    async def generate(self, request: Request) -> AsyncGenerator[list[Output] | MotetError, None]:
        """Deltas as they become ready, until each choice has one with a `finish_reason`; or why there are none."""
        delivery, unfinished = Delivery().here(), request.sampling.n
        queue = OutputQueue(delivery)
        try:
            self._engine.submit(request, queue.put, delivery.wake)
        except MotetError as error:
            yield error
            return
        try:
            while unfinished:
                outputs = await queue.take()
                unfinished -= sum(output.finish_reason is not None for output in outputs)
                yield outputs
        finally:
            if unfinished:
                self._engine.abort(request.request_id, FinishReason.CANCELLED)

    async def embed(
        self, prompt: tuple[int, ...], ensemble: Ensemble, owner: Owner
    ) -> npt.NDArray[np.float32] | MotetError:
        try:
            return (await embed_all(self._engine.embedder, [prompt], ensemble, owner))[0]
        except MotetError as error:
            return error

    async def stats(self) -> EngineStats:
        self._heard = time.monotonic()
        return self._engine.stats()

    def check_health(self) -> None:
        """Ray Serve replaces a replica whose check raises."""
        if self._engine.failure is not None:
            raise RuntimeError(str(self._engine.failure))

    def record_routing_stats(self) -> dict[str, Any]:
        """What `PrefixRouting.update` takes."""
        keys = pack_keys(self._engine.cached_digests())
        size = self._engine.stats().block_size
        return {"version": next(self._versions), "keys": keys, "tokens": self._tokens(), "block_size": size}

    def record_autoscaling_stats(self) -> dict[str, float]:
        return {TOKENS_METRIC: float(self._tokens())}

    def _tokens(self) -> int:
        stats = self._engine.stats()
        return stats.waiting_tokens + RUNNING_TOKENS * stats.running

    def __del__(self) -> None:
        if hasattr(self, "_engine"):
            self._engine.close()


class PrefixRouter(RequestRouter):
    """`PrefixRouting` for Ray Serve: it runs where the deployment's handle is."""

    def initialize_state(self, **kwargs: Any) -> None:
        self._routing = PrefixRouting(by_prefix=kwargs["by_prefix"])

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        by_name = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        self._routing.update({name: replica.routing_stats or {} for name, replica in by_name.items()})
        request = _request(pending_request)
        return [[by_name[name]] for name in self._routing.rank(request)]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        self._routing.sent(
            replica_id.unique_id, pending_request.metadata.internal_request_id, _request(pending_request)
        )

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        self._routing.ended(replica_id.unique_id, internal_request_id)


def _request(pending: PendingRequest | None) -> Request | None:
    """None: it is no request for an answer."""
    found = pending.args[0] if pending is not None and pending.args else None
    return found if isinstance(found, Request) else None


class ByQueuedTokens:
    """As many replicas as keep the tokens that wait at each below `tokens`, and that run at most `requests` each."""

    def __init__(self, tokens: int, requests: int) -> None:
        self._tokens, self._requests = tokens, requests

    def __call__(self, context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        latest = (context.aggregated_metrics or {}).get(TOKENS_METRIC, {})
        wanted = replicas_for(sum(latest.values()), context.total_num_requests, self._tokens, self._requests)
        low, high = context.capacity_adjusted_min_replicas, context.capacity_adjusted_max_replicas
        return min(max(wanted, low), high), {}


def replicas_for(queued_tokens: float, requests: float, tokens: int, requests_each: int) -> int:
    """Replicas for so many tokens that wait and requests that are open."""
    return max(1, math.ceil(queued_tokens / tokens), math.ceil(requests / requests_each))
