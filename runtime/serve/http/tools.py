"""`Tools`: the tools of a request, in whichever API it came."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import msgspec

from ...api.structure import Structure
from ...errors import InvalidRequestError
from ...text.tokenizer import Tokenizer
from ...text.tools import ToolCall, ToolFormat, ToolReader, check_tools, forced_call, tool_format


class NamedFunction(msgspec.Struct, forbid_unknown_fields=True):
    name: str


class NamedTool(msgspec.Struct, forbid_unknown_fields=True):
    function: NamedFunction
    type: Literal["function"] = "function"


class Tools:
    """What the chat template is shown, what the answer is forced to be, and how it is read."""

    def __init__(
        self,
        tools: Sequence[dict[str, Any]],
        choice: Literal["none", "auto", "required"] | NamedTool | None,
        parallel: bool | None,
        tokenizer: Tokenizer,
    ) -> None:
        """`tools`, `choice`: as OpenAI's chat API has them. `parallel` False: at most one call. Raises `InvalidRequestError`."""
        known = check_tools(tools)
        if choice not in (None, "none") and not known:
            raise InvalidRequestError(
                "tool_choice chooses among tools, and there are none; give tools", field="tool_choice"
            )
        if parallel is not None and not known:
            raise InvalidRequestError(
                "parallel_tool_calls is for tools; give some, or leave it out", field="parallel_tool_calls"
            )
        self.shown = () if choice == "none" else tuple(tools)
        self._names = frozenset(known) if self.shown else frozenset()
        self._format: ToolFormat | None = tool_format(tokenizer) if self._names else None
        self.structure: Structure | None = None
        if isinstance(choice, NamedTool):
            name = choice.function.name
            if name not in known:
                raise InvalidRequestError(f"tool_choice names {name!r}, which is no tool here", field="tool_choice")
            known = {name: known[name]}
        if self._format is not None and (choice == "required" or isinstance(choice, NamedTool)):
            self.structure = forced_call(known, self._format)
        self._most = 1 if parallel is False else None

    def reader(self) -> ToolReader | None:
        """For one choice; None without tools."""
        return ToolReader(self._format, self._names) if self._format is not None else None

    def kept(self, calls: list[ToolCall]) -> list[ToolCall]:
        return calls[: self._most]
