"""`StructureCompiler`: structures of requests are compiled before the engine gets them, and hold up only each other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor

from ..api.structure import Structure
from ..errors import OverloadedError
from ..text.grammar import GrammarMatcher, Grammars

_MOST_WAITING = 8  # new structures of a tenant
Run = Callable[[Callable[[], GrammarMatcher], ThreadPoolExecutor | None], Awaitable[GrammarMatcher]]


class StructureCompiler:
    """For one event loop. `run` runs work in some threads, or in those of the readers."""

    def __init__(self, grammars: Grammars, run: Run) -> None:
        grammars.tries_first = True
        self._grammars, self._run = grammars, run
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="motet-compiler")
        self._waiting = Counter[str]()  # by tenant

    async def compile(self, structure: Structure, tenant: str) -> None:
        """So that the engine finds it among those of late. Raises `InvalidRequestError`, and `OverloadedError` if many new ones
        of the tenant wait: to try a hostile one takes most of a second."""
        if self._grammars.is_known(structure, tenant):
            await self._run(lambda: self._grammars.matcher(structure, tenant), None)
            return
        if self._waiting[tenant] >= _MOST_WAITING:
            raise OverloadedError(f"{_MOST_WAITING} new structures are being compiled; try again later")
        self._waiting[tenant] += 1
        try:
            await self._run(lambda: self._grammars.matcher(structure, tenant), self._thread)
        finally:
            self._waiting[tenant] -= 1
            if not self._waiting[tenant]:
                del self._waiting[tenant]
