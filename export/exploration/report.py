"""The page of a search: what each candidate costs and loses, and which one was chosen."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path

from ...pages import COLOURS, Bars, Part, Table, figure, page, svg
from ...runtime.model.files import replace_file
from ..quantisation.method import Method
from .candidate import Candidate

_HEADER = [
    "", "bits a weight", "MB of weights", "KL", "KL reversed", "ΔNLL", "top-1 equal", "recall", "ROUGE-L", "decode", "prefill",
    "made in",
]  # fmt: skip


def write_report(
    path: Path, name: str, candidates: Sequence[Candidate], kept: Sequence[Candidate], chosen: Candidate, why: str
) -> None:
    """Write it, as a whole. `kept`: those that no other one beats. Raises `MissingPackageError` without matplotlib."""
    layers = [*(str(index) for index in range(len(chosen.layer_kl) - 1)), "head, embedding"]
    title = "Expected KL of each layer's rounding, of the chosen one"
    parts: list[Part | str] = [
        f"<p>{len(candidates)} candidates. Chosen: <b>{html.escape(chosen.name)}</b>, {html.escape(why)}.</p>",
        _sizes(candidates, kept, chosen),
        Table("Worth keeping: no other one is smaller and nearer to fp32", _HEADER, [_row(one) for one in kept]),
        Table("All, in the order in which they were made", _HEADER, [_row(one) for one in candidates]),
        Bars(title, "nats a token", layers, {"expected": list(chosen.layer_kl)}),
        "<p>KL, KL reversed, ΔNLL and top-1 are of held-out text against fp32, as the bundle is served. Recall: codes that were "
        "repeated exactly. ROUGE-L: greedy answers beside the data's. Decode and prefill: tokens per second of one sequence on "
        "this machine, each candidate at its own time.</p>",
    ]
    replace_file(path, page(f"Search {name}", parts))


def _row(one: Candidate) -> list[str]:
    return [
        one.name,
        f"{one.bits:.3f}",
        f"{one.num_bytes / 1e6:.1f}",
        f"{one.kl:.4f}",
        f"{one.reverse_kl:.4f}",
        f"{one.nll_change:+.2%}",
        f"{one.top1:.1%}",
        "–" if one.recall is None else f"{one.recall:.0%}",
        "–" if one.rouge_l is None else f"{one.rouge_l:.3f}",
        f"{one.decode:.1f}",
        f"{one.prefill:.0f}",
        f"{one.seconds:.0f} s",
    ]


def _sizes(candidates: Sequence[Candidate], kept: Sequence[Candidate], chosen: Candidate) -> str:
    drawn = figure(height_in=4.0)
    axes = drawn.subplots()
    for colour, method in zip(COLOURS, Method):
        of = [one for one in candidates if one.method is method]
        if of:
            axes.scatter(
                [c.num_bytes / 1e6 for c in of], [c.kl for c in of], s=22, color=colour, label=str(method), zorder=3
            )
    axes.plot([c.num_bytes / 1e6 for c in kept], [c.kl for c in kept], color="#222", linewidth=1, label="worth keeping")
    axes.scatter(
        [chosen.num_bytes / 1e6], [chosen.kl], s=120, facecolors="none", edgecolors="#222", label="chosen", zorder=4
    )
    axes.set_yscale("log")
    axes.set(xlabel="MB of weights", ylabel="KL from fp32, nats a token")
    axes.set_title("Size and error", loc="left", fontsize=11)
    axes.grid(color="#e6eaee")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False)
    return svg(drawn, "Size and error of each candidate")
