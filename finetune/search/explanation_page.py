"""The HTML page of an explanation: one self-contained file with a table of members, documents by gain, and each token."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ...pages import COLOURS, Part, Table, page
from ...runtime.model.files import replace_file
from .explain import Explained, Explanation
from .scoring import F64

_BETTER, _WORSE = COLOURS[2], COLOURS[3]
_FULL = 2.0  # nats at which a token's colour is strongest
_END = "\u21b5"
_SYMBOLS = {code: chr(0x2400 + code) for code in range(0x20)} | {0x7F: "\u2421", 0x0A: _END}  # of what has no sign


def write_page(path: Path, found: Explanation) -> None:
    """Write it, as a whole."""
    replace_file(path, page(f"What the mix of {found.bundle} gains on {found.data}", _parts(found)))


def _parts(found: Explanation) -> list[Part | str]:
    single = found.member_nll()
    tokens = sum(len(document.nll) for document in found.documents)
    parts: list[Part | str] = [
        f"<p>{len(found.documents)} documents of the split {found.split}, {tokens:,} answer tokens. "
        f"The mix, in space {found.space}, has a negative log-likelihood of {found.nll():.4f} nats a token; "
        f"the best single member, <b>{html.escape(found.members[found.best])}</b>, {single[found.best]:.4f}.</p>",
        _members(found, single),
        _documents(found),
        f"<p>Below, each token has the colour of its gain over {html.escape(found.members[found.best])}: "
        f"{_mark('better', 1.0)}, {_mark('worse', -1.0)}. A member's help is what the mix loses without it, its other members' "
        "coefficients divided by their sum; it hurts where that is negative.</p>",
    ]
    for number, document in enumerate(found.documents, 1):
        parts += _document(found, number, document)
    return parts


def _members(found: Explanation, single: F64) -> Table:
    helps = np.concatenate([document.help for document in found.documents], axis=1)  # [K, tokens]
    most, least = helps.argmax(0), helps.argmin(0)
    rows = [
        [
            name,
            f"{found.mix[k]:.4f}",
            f"{found.temperatures[k]:.3f}",
            f"{single[k]:.4f}",
            f"{helps[k].mean():+.4f}",
            f"{((most == k) & (helps[k] > 0)).mean():.1%}",
            f"{((least == k) & (helps[k] < 0)).mean():.1%}",
        ]
        for k, name in enumerate(found.members)
    ]
    header = [
        "member",
        "coefficient",
        "temperature",
        "NLL alone",
        "help, nats a token",
        "tokens it helped most",
        "tokens it hurt most",
    ]
    return Table("Members", header, rows)


def _documents(found: Explanation) -> Table:
    rows = [
        [
            f"{number}. {_visible(document.source)}",
            f"{len(document.nll)}",
            f"{document.nll.mean():.4f}",
            *(f"{one:.4f}" for one in document.member_nll.mean(1)),
            f"{found.gain(document):+.4f}",
            *_ends(found.members, document.help.mean(1)),
        ]
        for number, document in enumerate(found.documents, 1)
    ]
    header = [
        "document",
        "tokens",
        "NLL mix",
        *(f"NLL {name}" for name in found.members),
        "gain",
        "helped most",
        "hurt most",
    ]
    return Table("Documents by gain over the best single member, nats a token", header, rows)


def _document(found: Explanation, number: int, document: Explained) -> list[Part | str]:
    gains = document.member_nll[found.best] - document.nll
    texts = [token.decode(errors="backslashreplace") for token in document.tokens]
    spans = [
        _mark(text, gain, _title(found.members, document, place))
        for place, (text, gain) in enumerate(zip(texts, gains.tolist(), strict=True))
    ]
    rows = [
        [
            f"{place + 1}. {_visible(text)}",
            f"{document.nll[place]:.3f}",
            *(f"{value:.3f}" for value in document.member_nll[:, place]),
            f"{gains[place]:+.3f}",
            *_ends(found.members, document.help[:, place]),
        ]
        for place, text in enumerate(texts)
    ]
    header = ["token", "NLL mix", *(f"NLL {name}" for name in found.members), "gain", "helped most", "hurt most"]
    return [
        f"<h2>{number}. {html.escape(_visible(document.source))}: {found.gain(document):+.4f}</h2>"
        f"<details><summary>Its prompt</summary><pre>{_flowing(document.prompt)}</pre></details>"
        f'<p style="white-space:pre-wrap">{"".join(spans)}</p><details><summary>Its tokens</summary>',
        Table("", header, rows),
        "</details>",
    ]


def _ends(names: Sequence[str], help: F64) -> tuple[str, str]:
    """Who helped most and who hurt most, with how much; a dash for nobody."""
    most, least = int(help.argmax()), int(help.argmin())
    return (
        f"{names[most]} {help[most]:+.3f}" if help[most] > 0 else "–",
        f"{names[least]} {help[least]:+.3f}" if help[least] < 0 else "–",
    )


def _title(names: Sequence[str], document: Explained, place: int) -> str:
    each = ", ".join(f"{name} {value:.3f}" for name, value in zip(names, document.member_nll[:, place], strict=True))
    return f"mix {document.nll[place]:.3f}; {each}"


def _mark(text: str, gain: float, title: str = "") -> str:
    """A text in the colour of its gain."""
    strength = round(min(1.0, abs(gain) / _FULL) * 0.7 * 255)
    colour = f"{_BETTER if gain > 0 else _WORSE}{strength:02x}"
    return f'<span style="background:{colour}" title="{html.escape(title)}">{_flowing(text)}</span>'


def _flowing(text: str) -> str:
    """HTML of a text whose lines end where they do."""
    return html.escape(_visible(text)).replace(_END, f"{_END}\n")


def _visible(text: str) -> str:
    """With signs for control characters, which a page may not have."""
    return text.translate(_SYMBOLS)
