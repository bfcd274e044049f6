"""`open_engine`: an engine made from a bundle: its backend and its tokenizer."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from ..api.config import EngineConfig
from ..api.model_info import ModelInfo
from ..backends.open import open_backend
from ..encoders.reader import open_media
from ..errors import BundleError, shown
from ..model.bundle import Bundle
from ..model.decoder_graph import GraphConfig
from ..text.tokenizer import Tokenizer
from .engine import Engine
from .observer import Observer


def open_engine(
    path: Path | str, config: EngineConfig | None = None, *, verify: bool = True, observers: Sequence[Observer] = ()
) -> Engine:
    """Load a bundle and start an engine on it. `verify` compares the files' digests. Raises what `load_bundle` and
    `open_backend` raise."""
    config = config or EngineConfig()
    bundle = load_bundle(Path(path), config, verify=verify)
    backend = open_backend(bundle, config)
    try:
        tokenizer, media = bundle_tokenizer(bundle), open_media(bundle, config, backend)
    except BaseException:
        backend.close()
        raise
    model = dataclasses.replace(model_info(bundle, config), media=tuple(media.media))
    return Engine(backend, tokenizer, model, config, observers, media)


def bundle_tokenizer(bundle: Bundle) -> Tokenizer:
    """A bundle's tokenizer, which lets no text write what a medium becomes. Raises what `Tokenizer.from_dir` raises, and
    `BundleError` if it has other ids for that than the manifest."""
    control = [token for encoder in bundle.encoders.values() for token in encoder.control_tokens]
    tokenizer = Tokenizer.from_dir(bundle.path, control)
    for encoder in bundle.encoders.values():
        found = tokenizer.token_id(encoder.token)
        missing = [token for token in encoder.needed_tokens if tokenizer.token_id(token) is None]
        if found != encoder.token_id or missing:
            raise BundleError(
                f"the manifest of '{bundle.path}' gives {shown(encoder.token)} the id {encoder.token_id}, the tokenizer {found}, "
                f"which lacks {missing}; export the bundle again"
            )
    return tokenizer


def load_bundle(path: Path, config: EngineConfig, *, verify: bool = True) -> Bundle:
    """Read a bundle, after its signature if the configuration asks for one. Raises what `Bundle.load` and
    `signature.verify` raise."""
    check_signature(path, config)
    return Bundle.load(path, verify=verify)


def check_signature(path: Path, config: EngineConfig) -> None:
    """Check a bundle's signature if the configuration asks for one; whoever reads a bundle without an engine calls it first.
    Raises what `signature.verify` raises."""
    if config.verify_key is not None or config.verify_ca is not None:
        from ..model.signature import verify as verify_signature  # its packages are optional

        verify_signature(path, config.verify_key, config.verify_ca)


def model_info(bundle: Bundle, config: EngineConfig) -> ModelInfo:
    """What callers see of a bundle that is served with this configuration."""
    return ModelInfo(
        name=bundle.name,
        members=bundle.members,
        default_ensemble=bundle.default_ensemble,
        eos_token_ids=bundle.eos_token_ids,
        vocab_size=bundle.sizes.vocab_size,
        max_model_len=config.positions(bundle.sizes.max_position_embeddings),
        calibration=bundle.calibration,
        digest=bundle.digest,
        origins=bundle.origins,
        hidden_size=0 if isinstance(bundle.sizes, GraphConfig) else bundle.sizes.hidden_size,
    )
