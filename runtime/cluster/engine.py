"""`ClusterEngine`: replicas on a Ray cluster as one engine, so that every door serves them as it serves an engine here."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import threading
import uuid
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy, RequestRouterConfig
from ray.serve.exceptions import BackPressureError, RayServeException

from ..api.config import EngineConfig
from ..api.output import Output
from ..api.request import FinishReason, Request
from ..encoders.reader import no_media
from ..engine.answer import OnOutput, OnSent
from ..engine.embedder import EmbedJob
from ..engine.observer import Observer, notify
from ..engine.open import bundle_tokenizer, load_bundle, model_info
from ..engine.stats import EngineStats
from ..errors import InvalidRequestError, MotetError, OverloadedError, UnavailableError
from ..text.grammar import Grammars
from ..text.media import MediaReader
from .connection import connect
from .replica import ByQueuedTokens, PrefixRouter, Replica
from .settings import ClusterSettings

log = logging.getLogger("motet.cluster")
_STOP_S = 30.0
_STATS_S = 1.0
_GONE: MotetError = UnavailableError("the replica that answered has ended; send the request again")


class ClusterEngine:
    """Starts `settings.replicas` engines on the cluster, as an application of its own, and ends them with `close`. Requests are
    checked where they run.

    Raises `BundleError`, `UnavailableError` (there is no cluster, or no replica became ready).
    """

    def __init__(self, bundle: Path, config: EngineConfig, settings: ClusterSettings) -> None:
        loaded = load_bundle(bundle, config)
        self.tokenizer = bundle_tokenizer(loaded)
        self.model, self.config = model_info(loaded, config), config
        self.grammars = Grammars(self.tokenizer, self.model.vocab_size, self.model.eos_token_ids)
        self.media: MediaReader = no_media(
            config, "replicas on a cluster take text only", "serve media with `motet serve` without --ray"
        )
        self.embedder = _Embedder(self)
        self._observers: tuple[Observer, ...] = ()
        self._open: dict[
            str, asyncio.Task[None] | FinishReason | None
        ] = {}  # None: it has not begun; a reason: nor will it
        self._is_draining = False
        self._stats = _total([])
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="motet-cluster", daemon=True)
        self._thread.start()
        self._application = f"motet-{uuid.uuid4().hex[:12]}"  # another's of the same name would be replaced
        try:
            if loaded.encoders:  # replicas get token ids alone: they need not load them
                config = dataclasses.replace(config, max_images=0, max_audios=0)
            self._handle = _start(self._application, bundle, config, settings)
        except BaseException as error:
            self._stop_loop()
            self._end_application()
            if isinstance(error, ConnectionError | RuntimeError | TimeoutError | RayServeException):
                raise UnavailableError(f"no replica became ready on '{settings.address}': {error}") from error
            raise
        self.run(self._follow_stats())

    def __enter__(self) -> ClusterEngine:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def run(self, work: Coroutine[Any, Any, None]) -> None:
        """Start work on the loop that talks to the replicas."""
        asyncio.run_coroutine_threadsafe(work, self._loop)

    # ---- as `Engine` ---------------------------------------------------------------------------------------------

    @property
    def failure(self) -> MotetError | None:
        return None  # Ray Serve replaces replicas that fail

    @property
    def is_idle(self) -> bool:
        return not self._open

    def check(self, request: Request) -> None:
        if self._is_draining:
            raise UnavailableError("the server is shutting down; send the request to another one")

    def submit(self, request: Request, on_output: OnOutput, on_sent: OnSent | None = None) -> None:
        self.check(request)
        if request.request_id in self._open:
            raise InvalidRequestError(f"request '{request.request_id}' is open already", field="request_id")
        self._open[request.request_id] = None
        self.run(self._answer(request, on_output, on_sent or (lambda: None)))

    def abort(self, request_id: str | None, reason: FinishReason = FinishReason.CANCELLED) -> None:
        def end() -> None:
            for id, task in list(self._open.items()):
                if request_id in (None, id) and not isinstance(task, FinishReason):
                    if task is None:
                        self._open[id] = reason
                    else:
                        task.cancel(reason)

        self._loop.call_soon_threadsafe(end)

    def subscribe(self, observer: Observer) -> None:
        self._observers += (observer,)

    def stats(self) -> EngineStats:
        """Of all replicas together, at most a second old."""
        return self._stats

    def drain(self) -> None:
        self._is_draining = True

    def close(self) -> None:
        self.abort(None, FinishReason.SHUTDOWN)
        try:
            self._stop_loop()
            self.grammars.close()
        finally:
            self._end_application()

    def _end_application(self) -> None:
        try:
            if ray.is_initialized():
                serve.delete(self._application)
        finally:
            ray.shutdown()

    # ---- requests ------------------------------------------------------------------------------------------------

    async def _answer(self, request: Request, on_output: OnOutput, on_sent: OnSent) -> None:
        unfinished = dict.fromkeys(range(request.sampling.n))
        before = self._open[request.request_id]
        if isinstance(before, FinishReason):
            reason, error = before, _GONE
        else:
            self._open[request.request_id] = asyncio.current_task()
            reason, error = await self._follow(request, on_output, on_sent, unfinished)
        del self._open[request.request_id]
        for choice in unfinished:
            last = Output(request.request_id, choice, request.sampling.seed or 0)
            last.finish_reason, last.error = reason, error if reason is FinishReason.ERROR else None
            on_output(last)
        on_sent()

    async def _follow(
        self, request: Request, on_output: OnOutput, on_sent: OnSent, unfinished: dict[int, None]
    ) -> tuple[FinishReason, MotetError]:
        """Pass on what a replica sends. Returns why the choices end that are left in `unfinished`."""
        reason, error = FinishReason.ERROR, _GONE
        responses = self._handle.options(stream=True).generate.remote(request)
        try:
            async for found in responses:
                if isinstance(found, MotetError):
                    error = found
                    self._tell_refusal(request, found)
                    break
                for output in found:
                    if output.finish_reason is not None:
                        unfinished.pop(output.choice, None)
                        self._tell_end(request, output)
                    on_output(output)
                if unfinished:  # the last go when the replica's stream has ended: a client's next request finds it free
                    on_sent()
        except asyncio.CancelledError as cancelled:
            reason = next(iter(cancelled.args), FinishReason.CANCELLED)
        except BackPressureError:
            error = OverloadedError("every replica has as many requests as it may queue; try again later")
        except Exception as fault:
            log.warning("a replica ended in a request: %s", str(fault).strip().splitlines()[-1:])
        finally:
            responses.cancel()
        return reason, error

    def _tell_refusal(self, request: Request, error: MotetError) -> None:
        notify(self._observers, lambda observer: observer.on_reject(request, error))

    def _tell_end(self, request: Request, last: Output) -> None:
        notify(self._observers, lambda observer: observer.on_finish(request, last))

    async def embed(self, job: EmbedJob) -> None:
        try:
            job.on_done(await self._handle.embed.remote(job.prompt, job.ensemble, job.owner))
        except BackPressureError:
            job.on_done(OverloadedError("every replica has as many requests as it may queue; try again later"))
        except Exception:
            job.on_done(_GONE)

    async def _follow_stats(self) -> None:
        while True:
            try:
                found = await self._handle.broadcast("stats").results_async(timeout_s=_STATS_S)
                self._stats = _total(found)
            except Exception as error:
                log.debug("the replicas' counts are not known: %s", error)
            await asyncio.sleep(_STATS_S)

    def _stop_loop(self) -> None:
        asyncio.run_coroutine_threadsafe(_end_tasks(), self._loop).result(_STOP_S)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


async def _end_tasks() -> None:
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    if tasks:
        await asyncio.wait(tasks)


class _Embedder:
    """As `Embedder`."""

    def __init__(self, engine: ClusterEngine) -> None:
        self._engine = engine

    def submit(self, jobs: Sequence[EmbedJob]) -> None:
        for job in jobs:
            self._engine.run(self._engine.embed(job))

    def cancel(self, jobs: Sequence[EmbedJob]) -> None:
        """A text is short work: its replica ends it."""


def _total(replicas: Sequence[EngineStats]) -> EngineStats:
    names = EngineStats.__dataclass_fields__
    total = EngineStats(**{name: sum(getattr(stats, name) for stats in replicas) for name in names})
    return dataclasses.replace(total, block_size=max((stats.block_size for stats in replicas), default=0))


def _start(name: str, bundle: Path, config: EngineConfig, settings: ClusterSettings) -> Any:
    """The handle of the application's deployment."""
    connect(settings.address, settings.most * settings.threads(config))
    config = dataclasses.replace(config, threads=settings.threads(config))  # as many as Ray reserves for it
    scaling: dict[str, Any] = {"num_replicas": settings.replicas}
    if settings.most > settings.replicas:
        policy = AutoscalingPolicy(  # type: ignore[no-untyped-call]
            policy_function=ByQueuedTokens,
            policy_kwargs={"tokens": settings.queued_tokens, "requests": config.max_num_seqs},
        )
        scaling = {
            "autoscaling_config": AutoscalingConfig(
                min_replicas=settings.replicas, max_replicas=settings.most, policy=policy, upscale_delay_s=5
            )
        }
    routing: dict[str, Any] = {
        "request_router_class": PrefixRouter,
        "request_router_kwargs": {"by_prefix": settings.by_prefix},
        "request_routing_stats_period_s": _STATS_S,
    }
    deployment: Any = serve.deployment(
        Replica,
        name="engine",
        ray_actor_options={"num_cpus": settings.threads(config)},
        max_ongoing_requests=config.max_requests,
        max_queued_requests=config.max_waiting,
        request_router_config=RequestRouterConfig(**routing),
        health_check_period_s=2.0,
        **scaling,
    )
    serve.start(proxy_location="Disabled")  # the doors are ours
    return serve.run(deployment.bind(str(bundle.resolve()), config, settings.orphaned_s), name=name, route_prefix=None)
