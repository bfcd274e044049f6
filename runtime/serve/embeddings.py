"""`embed_all`: the engine's embeddings, for an event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..api.request import Ensemble, Owner
from ..engine.embedder import EmbedJob
from ..engine.interface import Embeds
from ..errors import MotetError


@dataclass(frozen=True, slots=True)
class Embeddings:
    vectors: list[npt.NDArray[np.float32]]  # [hidden], of length 1
    prompt_tokens: int


async def embed_all(
    embedder: Embeds, prompts: Sequence[tuple[int, ...]], ensemble: Ensemble, owner: Owner
) -> list[npt.NDArray[np.float32]]:
    """One per prompt. Cancelling it cancels them. Raises what `Embedder.submit` raises, and the error that ended one."""
    loop = asyncio.get_running_loop()
    waiting: list[asyncio.Future[Any]] = [loop.create_future() for _ in prompts]
    jobs = [
        EmbedJob(prompt, ensemble, _resolver(loop, one), owner) for prompt, one in zip(prompts, waiting, strict=True)
    ]
    embedder.submit(jobs)
    try:
        return list(await asyncio.gather(*waiting))
    except BaseException:  # one has failed, or the caller went away
        embedder.cancel(jobs)
        raise


def _resolver(loop: asyncio.AbstractEventLoop, future: asyncio.Future[Any]) -> Callable[[Any], None]:
    """Give a future its result, from any thread."""

    def resolve(result: Any) -> None:
        if future.done():
            return
        if isinstance(result, MotetError):
            future.set_exception(result)
        else:
            future.set_result(result)

    def on_done(result: Any) -> None:
        with suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(resolve, result)

    return on_done
