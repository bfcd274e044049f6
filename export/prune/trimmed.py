"""`TrimmedVocabulary`: a model directory's tokenizer and settings with fewer tokens."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...runtime.checkpoints.rewrite import copy_texts
from ...runtime.checkpoints.weight_files import read_json
from ...runtime.errors import BundleError, ConfigError, DataError, UnsupportedModelError
from ...runtime.model.config import DecoderConfig
from ...runtime.text.tokenizer import Tokenizer
from .corpus import corpus_texts, template_texts
from .token_ids import declared_ids, ids_in, renumbered_ids
from .vocabulary import State, trim

_SETTINGS = ("generation_config.json", "tokenizer_config.json")


@dataclass(frozen=True, slots=True)
class TrimmedVocabulary:
    """`kept`: new token id → the old one. `tokenizer`: the new tokenizer.json. `settings`: name → content of the other files
    that name token ids, with the new ones."""

    kept: tuple[int, ...]
    tokenizer: State
    settings: Mapping[str, Mapping[str, Any]]

    def renumbered(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Settings with the new token ids."""
        return renumbered_ids(values, {old: new for new, old in enumerate(self.kept)})

    def write(self, model_dir: Path, work: Path) -> None:
        """Write the files of the tokenizer, and those that have token ids. Older forms of the vocabulary are left out."""
        copy_texts(model_dir, work, ("chat_template.jinja", "special_tokens_map.json", "LICENSE"))
        for name, values in {"tokenizer.json": self.tokenizer, **self.settings}.items():
            (work / name).write_text(json.dumps(values, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def trimmed_vocabulary(model_dir: Path, config: DecoderConfig, corpus: Sequence[Path]) -> TrimmedVocabulary:
    """The vocabulary that the files of `corpus` need. Raises what `trim` and `corpus_texts` raise, `BundleError` for settings
    whose token ids the model does not have, `ConfigError` if nothing can be removed."""
    tokenizer = Tokenizer.from_dir(model_dir)
    tokenizer.check_ids(config.vocab_size)
    if not any(corpus_texts(corpus)):
        raise DataError("the corpus is empty, so no token is used; give text")
    found = {name: read_json(model_dir / name) for name in _SETTINGS if (model_dir / name).is_file()}
    if found.get("tokenizer_config.json", {}).get("split_special_tokens"):
        raise UnsupportedModelError(
            "tokenizer_config.json has split_special_tokens=true, and the vocabulary is trimmed for texts whose special "
            "tokens are whole; remove the key"
        )
    needed: set[int] = set()
    for values in (read_json(model_dir / "config.json"), *found.values()):
        needed |= ids_in(values, config.vocab_size)
    declared = declared_ids(found.get("tokenizer_config.json", {}))
    if any(not 0 <= token_id < config.vocab_size for token_id in declared):
        raise BundleError(f"tokenizer_config.json has added tokens beyond the model's {config.vocab_size} embeddings")

    def texts() -> Iterator[str]:
        return itertools.chain(corpus_texts(corpus), template_texts(tokenizer, corpus))

    trimmed = trim(json.loads(tokenizer.to_json()), texts, needed | declared)
    if len(trimmed.kept) >= config.vocab_size:
        raise ConfigError(
            f"the corpus needs all {config.vocab_size} tokens; leave out --vocabulary, or give another text"
        )
    new = {old: index for index, old in enumerate(trimmed.kept)}
    settings = {name: renumbered_ids(values, new) for name, values in found.items()}
    return TrimmedVocabulary(trimmed.kept, trimmed.tokenizer, settings)
