"""Texts to cut into tokens: the documentation, and what tokenizers disagree about."""

from __future__ import annotations

from pathlib import Path

DOCS = "\n".join(path.read_text(encoding="utf-8") for path in sorted((Path(__file__).parents[2] / "docs").glob("*.md")))
TEXTS = [
    "Hello  world",
    " leading",
    "   three",
    "trailing  ",
    "",
    " ",
    "   ",
    "a\nb\n\n c",
    "tab\tand 12345.67",
    "\r\n\x00\x01\x7f",
    "naïve Straße Ωmega 日本語 😀👍🏽",
    "e\u0301 \u00a0\u3000\u200bx",
    "don't we'll I'VE",
    "x" * 40,
    "ab" * 30,
    "a" * 33,
    "aaaaaaabababab",
    "\n\n\n  x",
    "def f(x):\n    return x ** 2\n",
]
