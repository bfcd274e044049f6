"""Data sets: JSONL files and two built-in sets made from the Python standard library, which is on every machine.

stdlib-code   function source without its docstring → the docstring's first sentence
stdlib-docs   documentation of a module, class or function → its first paragraph

Examples are split by document (the file that they come from): one document is never on both sides.
"""

from __future__ import annotations

import ast
import hashlib
import json
import random
import sysconfig
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..runtime.errors import DataError, NotFoundError
from ..runtime.tokenizer import Message, Tokenizer

Split = Literal["train", "validation", "test"]
BUILT_IN = ("stdlib-code", "stdlib-docs")
CODE_INSTRUCTION = "Summarise what this Python function does in one sentence.\n\n"
DOCS_INSTRUCTION = "Write a one-paragraph introduction to this documentation.\n\n"
_NOT_DOCUMENTS = {"test", "tests", "idlelib", "lib2to3", "site-packages", "__pycache__", "turtledemo"}
_MAX_SOURCE_CHARACTERS = 4000


@dataclass(frozen=True, slots=True)
class Example:
    """A conversation without its answer, the answer, and the document that it comes from."""

    messages: tuple[Message, ...]
    completion: str
    source: str


@dataclass(frozen=True, slots=True)
class Dataset:
    name: str
    digest: str  # SHA-256 over all examples
    splits: dict[Split, list[Example]]


def load_dataset(spec: str) -> Dataset:
    """`spec`: a built-in set's name or a JSONL path. Examples of a split are in an order that is fixed but random.

    Raises `NotFoundError`, `DataError` (names the line and what is expected there).
    """
    if spec in BUILT_IN:
        examples = list(_code_examples() if spec == "stdlib-code" else _docs_examples())
    else:
        examples = list(_jsonl_examples(Path(spec)))
    if not examples:
        raise DataError(f"'{spec}' holds no examples")
    digest = hashlib.sha256()
    splits: dict[Split, list[Example]] = {"train": [], "validation": [], "test": []}
    for example in examples:
        digest.update(repr((example.messages, example.completion)).encode())
        splits[_split_of(example.source)].append(example)
    if spec not in BUILT_IN and not (splits["validation"] and splits["train"]):
        splits = _split_small(examples)
    for part in splits.values():
        random.Random(0).shuffle(part)
    return Dataset(Path(spec).name, digest.hexdigest(), splits)


def _split_of(source: str) -> Split:
    """80 % train, 10 % validation, 10 % test, by a hash of the document's name."""
    bucket = int(hashlib.sha256(source.encode()).hexdigest(), 16) % 10
    return "test" if bucket == 0 else "validation" if bucket == 1 else "train"


def _split_small(examples: list[Example]) -> dict[Split, list[Example]]:
    """A file of a few records may leave a split empty by chance: cut it in order instead."""
    count = len(examples) // 5
    if not count:
        raise DataError(f"{len(examples)} examples are too few to keep some for validation; give at least 5")
    return {"train": examples[2 * count :], "validation": examples[:count], "test": examples[count : 2 * count]}


# ---- built-in sets ---------------------------------------------------------------------------------------------------


def _documents() -> Iterator[tuple[str, str, ast.Module]]:
    """(name, source, tree) of every module of the standard library, sorted by name."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if _NOT_DOCUMENTS & set(name.parts) or path.stem.startswith("_sysconfigdata"):
            continue
        try:
            source = path.read_text(encoding="utf-8")
            yield str(name), source, ast.parse(source)
        except (SyntaxError, UnicodeDecodeError):
            continue  # a template or a test file for other encodings: no document


def _user(text: str) -> tuple[Message, ...]:
    return ({"role": "user", "content": text},)


def _code_examples() -> Iterator[Example]:
    for name, source, tree in _documents():
        lines = source.splitlines()
        for node in ast.walk(tree):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or len(node.body) < 2:
                continue
            docstring = ast.get_docstring(node)
            sentence = _first_sentence(docstring) if docstring else ""
            if not 20 <= len(sentence) <= 200:
                continue
            first = node.body[0]
            body = lines[node.lineno - 1 : first.lineno - 1] + lines[first.end_lineno or 0 : node.end_lineno]
            code = textwrap.dedent("\n".join(body))
            if 80 <= len(code) <= _MAX_SOURCE_CHARACTERS:
                yield Example(_user(f"{CODE_INSTRUCTION}```python\n{code}\n```"), sentence, name)


def _docs_examples() -> Iterator[Example]:
    for name, _, tree in _documents():
        for node in ast.walk(tree):
            if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            paragraphs = (ast.get_docstring(node) or "").split("\n\n")
            first = " ".join(paragraphs[0].split())
            rest = "\n\n".join(paragraphs[1:]).strip()
            if 30 <= len(first) <= 400 and 100 <= len(rest) <= _MAX_SOURCE_CHARACTERS:
                yield Example(_user(DOCS_INSTRUCTION + rest), first, name)


def _first_sentence(text: str) -> str:
    paragraph = " ".join(text.split("\n\n")[0].split())
    end = paragraph.find(". ")
    return paragraph if end < 0 else paragraph[: end + 1]


def heldout_token_ids(
    tokenizer: Tokenizer, num_tokens: int, *, split: Split = "test", chunk: int = 512
) -> list[list[int]]:
    """At least `num_tokens` tokens of text from a split of the built-in sets, for measuring quality (test) or for
    calibration (train): conversations with their answers, as the model sees them, in chunks of `chunk` tokens."""
    parts = [load_dataset(name).splits[split] for name in BUILT_IN]
    token_ids: list[int] = []
    for code, docs in zip(*parts, strict=False):
        for example in (code, docs):
            token_ids += encode_prompt(tokenizer, example) + tokenizer.encode(
                example.completion, add_special_tokens=False
            )
        if len(token_ids) >= num_tokens + chunk:
            break
    count = -(-num_tokens // (chunk - 1))  # a chunk of S tokens makes S - 1 predictions
    chunks = [token_ids[i * chunk : (i + 1) * chunk] for i in range(count)]
    return [part for part in chunks if len(part) > 1]


def encode_prompt(tokenizer: Tokenizer, example: Example) -> list[int]:
    """The conversation up to the answer; without a chat template, the messages' texts."""
    if tokenizer.has_chat_template:
        return tokenizer.encode_chat(example.messages)
    return tokenizer.encode("\n\n".join(message["content"] for message in example.messages) + "\n\n")


# ---- JSONL -----------------------------------------------------------------------------------------------------------

_EXPECTED = '{"prompt": text, "completion": text} or {"messages": [{"role", "content"}, …, the answer]}'


def _jsonl_examples(path: Path) -> Iterator[Example]:
    if not path.is_file():
        raise NotFoundError(f"there is no file '{path}'; data is a JSONL file or one of {', '.join(BUILT_IN)}")
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield _example(line, f"{path}, line {number}", str(number))


def _example(line: bytes, where: str, source: str) -> Example:
    try:
        record: Any = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 at byte {error.start}; expected {_EXPECTED}") from error
    except ValueError as error:
        raise DataError(f"{where}: not JSON ({error}); expected {_EXPECTED}") from error
    if not isinstance(record, dict):
        raise DataError(f"{where}: a {type(record).__name__}; expected {_EXPECTED}")
    source = str(record.get("source", record.get("id", source)))
    if isinstance(record.get("prompt"), str) and isinstance(record.get("completion"), str):
        if not record["completion"].strip():
            raise DataError(f"{where}: the completion is empty; expected {_EXPECTED}")
        return Example(_user(record["prompt"]), record["completion"], source)
    messages = record.get("messages")
    if isinstance(messages, list) and len(messages) >= 2 and all(_is_message(message) for message in messages):
        if messages[-1]["role"] != "assistant":
            raise DataError(f"{where}: the last message must be the assistant's; expected {_EXPECTED}")
        return Example(tuple(messages[:-1]), messages[-1]["content"], source)
    raise DataError(f"{where}: has the keys {sorted(record)}; expected {_EXPECTED}")


def _is_message(message: Any) -> bool:
    return isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))
