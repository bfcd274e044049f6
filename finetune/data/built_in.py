"""Two built-in data sets, made from the source of the Python standard library, which every machine has.

stdlib-code   function source without its docstring → the docstring's first sentence
stdlib-docs   documentation of a module, class or function → its first paragraph
"""

from __future__ import annotations

import ast
import sysconfig
import textwrap
from collections.abc import Iterator
from pathlib import Path

from .example import Example, user

CODE_INSTRUCTION = "Summarise what this Python function does in one sentence.\n\n"
DOCS_INSTRUCTION = "Write a one-paragraph introduction to this documentation.\n\n"
_NOT_DOCUMENTS = {"test", "tests", "idlelib", "lib2to3", "site-packages", "__pycache__", "turtledemo"}
_MAX_SOURCE_CHARACTERS = 4000


def built_in_examples(name: str) -> Iterator[Example]:
    """The examples of the data set `name`, a key of `BUILT_IN`."""
    return BUILT_IN[name]()


def standard_library() -> Iterator[tuple[str, str, ast.Module]]:
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
            continue  # a template, or a test of other encodings


def _code_examples() -> Iterator[Example]:
    for name, source, tree in standard_library():
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
                yield Example(user(f"{CODE_INSTRUCTION}```python\n{code}\n```"), sentence, name)


def _docs_examples() -> Iterator[Example]:
    for name, _, tree in standard_library():
        for node in ast.walk(tree):
            if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            paragraphs = (ast.get_docstring(node) or "").split("\n\n")
            first = " ".join(paragraphs[0].split())
            rest = "\n\n".join(paragraphs[1:]).strip()
            if 30 <= len(first) <= 400 and 100 <= len(rest) <= _MAX_SOURCE_CHARACTERS:
                yield Example(user(DOCS_INSTRUCTION + rest), first, name)


def _first_sentence(text: str) -> str:
    paragraph = " ".join(text.split("\n\n")[0].split())
    end = paragraph.find(". ")
    return paragraph if end < 0 else paragraph[: end + 1]


BUILT_IN = {"stdlib-code": _code_examples, "stdlib-docs": _docs_examples}
