"""Seeded augmentation: it changes the words of an example's last message, before the chat template; the answer and all media
stay.

token-dropout   each word is left out with a probability of one in ten
span-mask       one run of words, a tenth of all, is replaced by "…"
paraphrase      the instruction gets other words (built-in sets), or the message is put in a frame
"""

from __future__ import annotations

import dataclasses
import random
import re

from .built_in import CODE_INSTRUCTION, DOCS_INSTRUCTION
from .example import Example, parts_of

SHARE = 0.1
_PARAPHRASES = {
    CODE_INSTRUCTION: (
        "In one sentence, what does this Python function do?\n\n",
        "Write a one-sentence docstring for this Python function.\n\n",
        "Describe the purpose of the following function in a single sentence.\n\n",
    ),
    DOCS_INSTRUCTION: (
        "Summarise this documentation in one introductory paragraph.\n\n",
        "Write the opening paragraph for the following documentation.\n\n",
    ),
}
_FRAMES = ("Please answer.\n\n{}", "{}\n\nAnswer briefly.", "Task:\n{}")


def augment(example: Example, how: str, rng: random.Random) -> Example:
    """`example` with its last message changed by the method `how`. Plain text has no message and stays as it is."""
    if how == "none" or not example.messages:
        return example
    *before, last = example.messages
    change = {"token-dropout": _drop, "span-mask": _mask, "paraphrase": _paraphrase}[how]
    parts = parts_of(last)
    at = max((i for i, part in enumerate(parts) if part["type"] == "text"), default=None)
    if at is None:
        return example
    parts[at] = {**parts[at], "text": change(parts[at]["text"], rng)}
    content = parts[at]["text"] if isinstance(last["content"], str) else parts
    return dataclasses.replace(example, messages=(*before, {**last, "content": content}))


def _drop(text: str, rng: random.Random) -> str:
    return re.sub(r"\w+", lambda match: "" if rng.random() < SHARE else match[0], text)


def _mask(text: str, rng: random.Random) -> str:
    words = list(re.finditer(r"\w+", text))
    if len(words) < 2:
        return text
    count = max(1, round(SHARE * len(words)))
    start = rng.randrange(len(words) - count + 1)
    return text[: words[start].start()] + "…" + text[words[start + count - 1].end() :]


def _paraphrase(text: str, rng: random.Random) -> str:
    for instruction, others in _PARAPHRASES.items():
        if text.startswith(instruction):
            return rng.choice((instruction, *others)) + text.removeprefix(instruction)
    return rng.choice(("{}", *_FRAMES)).replace("{}", text)
