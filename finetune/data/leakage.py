"""Near-duplicates between the training set and the held-out sets.

Two examples with the same media, or none, are near-duplicates if their sets of word 5-grams have a Jaccard similarity of at
least 0.8, as in Lee et al. 2022, and short ones if they are equal. 5-grams that many examples share (an instruction, a system
prompt) do not count: they say nothing about an example. The search is exact: it uses an inverted index of the held-out
examples' 5-grams, not a random sketch.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

from .example import Example

SIMILARITY = 0.8
_NGRAM = 5
_FEW = 16  # with fewer 5-grams, one other word may be all that differs: such examples must be equal
_COMMON_SHARE, _COMMON_COUNT = 0.1, 3  # a 5-gram is common if it is in more than both of the examples
# Words; each sign, emoji included; and each letter of scripts that do not put spaces between words.
_TOKENS = re.compile(r"[\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff]|[^\W\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff]+|[^\w\s]")


def common_ngrams(examples: Sequence[Example]) -> frozenset[int]:
    """The 5-grams that more than a tenth of the examples have, and more than three."""
    counts = Counter(ngram for example in examples for ngram in _ngrams(example))
    limit = max(_COMMON_COUNT, _COMMON_SHARE * len(examples))
    return frozenset(ngram for ngram, count in counts.items() if count > limit)


def near_duplicates(
    train: Sequence[Example], held_out: Sequence[Example], common: Iterable[int] = ()
) -> list[tuple[int, int]]:
    """(index in `train`, index in `held_out`): one pair for each training example that has a near-duplicate.

    `common`: the 5-grams that do not count, of `common_ngrams` over the whole data set.
    """
    ignored = frozenset(common)
    index: dict[int, list[int]] = defaultdict(list)
    texts: dict[str, int] = {}
    sizes = []
    for number, example in enumerate(held_out):
        ngrams = _ngrams(example) - ignored
        sizes.append(len(ngrams))
        texts[_text(example)] = number
        for ngram in ngrams:
            index[ngram].append(number)
    found = []
    for number, example in enumerate(train):
        other = texts.get(_text(example))
        if other is None:
            other = _similar(_ngrams(example) - ignored, index, sizes)
        if other is not None:
            found.append((number, other))
    return found


def _similar(ngrams: set[int], index: dict[int, list[int]], sizes: Sequence[int]) -> int | None:
    """The first held-out example whose 5-grams are similar to `ngrams`."""
    if len(ngrams) < _FEW:
        return None
    shared = Counter(other for ngram in ngrams for other in index.get(ngram, ()))
    return next(
        (other for other, count in shared.items() if count >= SIMILARITY * (len(ngrams) + sizes[other] - count)), None
    )


def _text(example: Example) -> str:
    """The text by which examples are equal: its case and its spaces do not count, media are named by their digests."""
    return " ".join(f"{_media(example)} {_words(example)}".split())


def _words(example: Example) -> str:
    return f"{example.prompt} {example.completion}".lower()


def _media(example: Example) -> str:
    return " ".join(file.digest for file in example.media)


def _ngrams(example: Example) -> set[int]:
    """Those of examples with different media differ: the same question about another image is another example."""
    tokens, media = _TOKENS.findall(_words(example)), _media(example)
    return {hash((media, *tokens[i : i + _NGRAM])) for i in range(len(tokens) - _NGRAM + 1)}
