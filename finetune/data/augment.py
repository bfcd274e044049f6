"""Augmentation, seeded: another wording of an example's prompt; the answer stays. Works on words, before the chat template.

token-dropout   every tenth word of the last message is left out, by chance
span-mask       one run of words, a tenth of them, is replaced by "…"
paraphrase      the instruction is put in other words (built-in sets), or the prompt into another frame
"""

from __future__ import annotations

import random
import re

from .built_in import CODE_INSTRUCTION, DOCS_INSTRUCTION
from .example import Example

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
    """`example` with its last message changed; plain text, which has none, as it is."""
    if how == "none" or not example.messages:
        return example
    *before, last = example.messages
    text = {"token-dropout": _drop, "span-mask": _mask, "paraphrase": _paraphrase}[how](last["content"], rng)
    return Example((*before, {**last, "content": text}), example.completion, example.source)


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
