"""`tune_projector`: a model gets an encoder of images or sounds, whose projector is trained, or trains that of its own on."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...runtime.checkpoints.encoders import encoder_pages, page_class, read_encoders
from ...runtime.checkpoints.encoders.page import EncoderPage, projector_of
from ...runtime.checkpoints.encoders.towers import Tower, read_source
from ...runtime.checkpoints.huggingface import read_config
from ...runtime.checkpoints.own_encoders import OWN, read_own
from ...runtime.errors import ConfigError, DataError
from ...runtime.model.config import DecoderConfig
from ...runtime.model.encoders import KINDS, Encoder
from ...runtime.model.encoders.audio import AudioEncoder, AudioProcessor, WhisperConfig
from ...runtime.model.encoders.efficientnet import EfficientNetConfig
from ...runtime.model.encoders.image import ImageEncoder, ImageProcessor
from ...runtime.model.files import check_replaceable
from ...runtime.text.tokenizer import Tokenizer
from ..data.example import SPLITS, Split
from ..params import PROJECTOR, NearDuplicates, TuneParams
from ..projector_params import PLACEHOLDERS, RESERVED, ProjectorParams
from .loop import SPELLED, Watch
from .methods import Base
from .progress import Progress
from .projector import RECORD, WHAT, ProjectorLearner, write_model
from .spelling import spell_answers
from .train import Workbench, bag_of, note_duplicates, run, work_dir
from .trunk_cache import TrunkCache

_SECONDS = 600.0  # of a sound, for encoders that are made here
_RESAMPLER_SIZE, _QUERIES = 256, 16
_UNUSED = ("head.",)  # of EfficientNet, whose levels are all taken
_POOL = {"whisper": 4, "siglip": 2, "efficientnet": 1}


def tune_projector(
    model_dir: Path,
    data: str,
    out: Path,
    *,
    encoders: Mapping[str, Path] | None = None,
    params: TuneParams | None = None,
    projector: ProjectorParams | None = None,
    name: str | None = None,
    cache: TrunkCache | None = None,
    use_cache: bool = True,
    near_duplicates: NearDuplicates = NearDuplicates.DROP,
    show_progress: bool = True,
    watch: Watch | None = None,
) -> dict[str, Any]:
    """Train projectors on `data`, write a model directory to `out`: the base's files, and its encoders beside them (see
    `own_encoders`). Returns its manifest, which is also its projector.json.

    `encoders`: medium → a tower (see `towers.read_source`), whose projector is new, or a model with such an encoder, whose
    projector is trained on. Without any, the projectors of the base's own encoders are trained on. The same call resumes a run
    that was killed. Raises what `tune` and `read_source` raise.
    """
    params, projector = params or TuneParams(method="projector"), projector or ProjectorParams()
    if params.method != PROJECTOR:
        raise ConfigError(f"method '{params.method}' trains no projector; use `tune`, or set method to projector")
    config = read_config(model_dir)
    params.fitted(config.max_position_embeddings)
    if not params.epochs and projector.spell_epochs is None:
        raise ConfigError("epochs is 0 and spell_epochs is not given, so nothing would be trained; give one of them")
    check_replaceable(out, RECORD, WHAT)
    for source in (model_dir, *(encoders or {}).values()):
        if source.resolve().is_relative_to(out.resolve()):
            raise ConfigError(f"'{out}' holds '{source}', and would replace it; choose another directory")
    pages, new = _pages(model_dir, dict(encoders or {}), params, projector, config.hidden_size)
    bench = Workbench(
        model_dir,
        data,
        (cache or TrunkCache()) if use_cache else None,
        near_duplicates,
        {**_others(model_dir, pages), **pages},
    )
    _check_data(bench, pages)
    with Progress(show_progress) as progress:
        note_duplicates(bench, progress)
        counts: dict[Split, int] = {"train": params.examples, "validation": params.validation_examples}
        loaded = bench.load(params, counts, progress.advance)

        train = bag_of(loaded.parts["train"], params)
        missing = sorted(set(pages) - {part.medium for item in train for part in item.encoded.embedded})
        if missing:
            raise DataError(
                f"none of the {len(train)} training examples that are taken has {' or '.join(missing)}: take more (--examples, "
                "--bag), or longer ones (--max-length)"
            )

        def learner(own: DecoderConfig, base: Base, settings: TuneParams) -> _Writer:
            made = _Writer(own, base, settings, pages, new, train)
            made.base_dir, made.pages, made.out = model_dir, pages, out
            if projector.spell_epochs is not None:
                made.spelled = spell_answers(
                    made,
                    train,
                    bench.tokenizer,
                    projector.spell_epochs,
                    work_dir(run_out) / SPELLED,
                    progress,
                )
            return made

        used = {medium: page.encoder.to_dict() for medium, page in pages.items()}
        run_out = out.parent / f".{out.name}.projector"  # a run writes a member, and this one a model beside it
        return run(
            bench,
            run_out,
            params,
            name=name or out.name,
            progress=progress,
            watch=watch,
            loaded=loaded,
            make_learner=learner,
            key={
                "encoders": used,
                "spell_epochs": projector.spell_epochs,
                "begin": {m: None if m in new else _digest(p.projector) for m, p in pages.items()},
            },
            finish=lambda trained: {
                "encoders": {m: {"is_new": m in new, **one} for m, one in used.items()},
                **({"spelled": trained.spelled} if projector.spell_epochs is not None else {}),
            },
        )


class _Writer(ProjectorLearner):
    spelled: Mapping[str, Any]
    base_dir: Path
    pages: Mapping[str, EncoderPage]
    out: Path

    def write(self, _out: Path, manifest: Mapping[str, Any], files: Mapping[str, str]) -> None:
        write_model(self.out, self.base_dir, self.pages, self.folded(), manifest, files)


def _pages(
    model_dir: Path, encoders: dict[str, Path], params: TuneParams, projector: ProjectorParams, hidden_size: int
) -> tuple[dict[str, EncoderPage], list[str]]:
    """The encoders that are trained, and which of them have a new projector."""
    if not encoders:
        own = read_own(model_dir)
        _check_kept(projector, "the base's own encoders")
        if projector.placeholder is not None:
            raise ConfigError("placeholder is of a new encoder, and the base's own keep theirs; leave it out")
        if not own:
            raise ConfigError(
                f"'{model_dir}' has no {OWN}, so it has no projector that can be trained on; give --encoder image=SOURCE or "
                "audio=SOURCE"
            )
        found = {medium: page for medium, page in encoder_pages(model_dir).items() if medium in own}
        for medium, page in found.items():
            _check_biases(medium, page)
        return found, []
    unknown = sorted(set(encoders) - set(KINDS))
    if unknown:
        raise ConfigError(f"an encoder is of {' or '.join(KINDS)}, got {unknown}")
    pages, new = {}, []
    taken = {medium: encoder.token for medium, encoder in read_encoders(model_dir).items()}
    tokenizer = Tokenizer.from_dir(model_dir)
    for medium, source in encoders.items():
        if medium in taken and medium not in read_own(model_dir):
            raise ConfigError(
                f"'{model_dir}' has an encoder of {medium} in its own weights, which cannot be replaced; give an encoder of "
                "another medium"
            )
        token, token_id = placeholder(tokenizer, medium, projector.placeholder, {**taken, medium: ""}.values())
        if (source / OWN).is_file():
            pages[medium] = _kept_page(source, medium, projector, token, token_id, hidden_size)
        else:
            tower = read_source(source)
            if tower.medium != medium:
                raise ConfigError(
                    f"'{source}' is an encoder of {tower.medium}; give it as --encoder {tower.medium}={source}"
                )
            pages[medium] = new_page(tower, source, projector, token, token_id, hidden_size, params.seed)
            new.append(medium)
        taken[medium] = token
    return pages, new


def _others(model_dir: Path, pages: Mapping[str, EncoderPage]) -> dict[str, EncoderPage]:
    """The base's encoders that are not trained: examples may have their media too."""
    if not set(read_encoders(model_dir)) - set(pages):
        return {}
    return {medium: page for medium, page in encoder_pages(model_dir).items() if medium not in pages}


def _kept_page(
    source: Path, medium: str, projector: ProjectorParams, token: str, token_id: int, hidden_size: int
) -> EncoderPage:
    """The encoder of a model, with its projector."""
    _check_kept(projector, f"the encoder of '{source}'")
    if medium not in read_own(source):
        raise ConfigError(f"'{source / OWN}' has no encoder of {medium}; it has {', '.join(read_own(source))}")
    page = encoder_pages(source)[medium]
    if page.encoder.output_size != hidden_size:
        raise ConfigError(
            f"the encoder of {medium} of '{source}' makes rows of {page.encoder.output_size}, the model has {hidden_size}; give "
            "its tower alone"
        )
    _check_biases(medium, page)
    page.encoder = dataclasses.replace(page.encoder, token=token, token_id=token_id)
    return page


def _check_biases(medium: str, page: EncoderPage) -> None:
    """The scales of training need biases to be folded into."""
    if not page.encoder.projector_bias:
        raise ConfigError(
            f"the projector of {medium} has no biases, and only one that has them can be trained on; begin a new one"
        )


def _check_kept(projector: ProjectorParams, what: str) -> None:
    for name in ("pool", "projector", "queries"):
        if getattr(projector, name) is not None:
            raise ConfigError(f"{name} is of a new projector, and that of {what} is trained on; leave it out")


def new_page(
    tower: Tower, source: Path, params: ProjectorParams, token: str, token_id: int, hidden_size: int, seed: int
) -> EncoderPage:
    """A tower with a random projector. Raises `ConfigError` if `params` do not fit it."""
    config, processor = tower.config, tower.processor
    kind = params.projector or ("resampler" if isinstance(config, EfficientNetConfig) else "mlp")
    if kind == "resampler" and isinstance(config, WhisperConfig):
        raise ConfigError(
            "a resampler makes a fixed number of rows, and sounds have different lengths; choose mlp or linear"
        )
    if params.queries is not None and kind != "resampler":
        raise ConfigError(f"queries are of a resampler, and the projector is {kind}; leave them out")
    sizes = {"mlp": hidden_size, "resampler": _RESAMPLER_SIZE}
    rest: dict[str, Any] = {
        "token": token,
        "token_id": token_id,
        "projector": kind,
        "projector_size": sizes.get(kind),
        "projector_bias": True,
    }
    encoder: Encoder
    if isinstance(config, WhisperConfig):
        assert isinstance(processor, AudioProcessor)
        encoder = AudioEncoder(
            tower=config,
            processor=processor,
            pad="row",
            pooling="stack",
            pool=params.pool or _POOL["whisper"],
            output_size=hidden_size,
            around=(),
            max_seconds=_SECONDS,
            **rest,
        )
        width = encoder.width
    else:
        assert isinstance(processor, ImageProcessor)
        vision = (
            dataclasses.replace(
                config, pool=params.pool or _POOL["efficientnet"], output_size=hidden_size, levels="all"
            )
            if isinstance(config, EfficientNetConfig)
            else dataclasses.replace(config, shuffle=params.pool or _POOL["siglip"], output_size=hidden_size)
        )
        queries = (params.queries or _QUERIES) if kind == "resampler" else None
        encoder = ImageEncoder(vision=vision, processor=processor, layout="rows", queries=queries, **rest)
        width = vision.width
    torch.manual_seed(seed)
    tensors = {f"tower.{name}": tensor for name, tensor in tower.weights.items() if not name.startswith(_UNUSED)}
    tensors |= {f"projector.{name}": tensor for name, tensor in projector_of(encoder, width).state_dict().items()}
    return page_class(encoder).from_tensors(encoder, tensors, source)


def placeholder(tokenizer: Tokenizer, medium: str, given: str | None, taken: Any) -> tuple[str, int]:
    """The token that stands for a row, and its id. `given`: None for the first of a list that the tokenizer has and that is not
    `taken`. Raises `ConfigError` if there is none, or it is not one token."""
    candidates = (*PLACEHOLDERS[medium], *RESERVED) if given is None else (given,)
    for token in candidates:
        token_id = tokenizer.token_id(token)
        if token_id is None or (given is None and token in taken) or tokenizer.template_mentions(token):
            continue
        if tokenizer.encode(token * 3, add_special_tokens=False) == [token_id] * 3:
            return token, token_id
    if given is not None:
        raise ConfigError(
            f"placeholder '{given}' must be one token of the model's tokenizer that its chat template does not write; choose a "
            "special token that no text needs"
        )
    raise ConfigError(
        f"the model's tokenizer has none of the tokens that stand for {medium} by default ({', '.join(candidates)}); give one of "
        "its special tokens that no text needs, with --placeholder"
    )


def _check_data(bench: Workbench, pages: Mapping[str, EncoderPage]) -> None:
    """Raises `DataError` for an example that trains no projector, and for a projector that no example trains."""
    for split in SPLITS[:2]:
        for example in bench.dataset.splits[split]:
            if not any(file.kind in pages for file in example.media):
                raise DataError(
                    f"the example from '{example.source}' has no {' or '.join(pages)}, so it trains no projector; leave it out"
                )
    kinds = {file.kind for example in bench.dataset.splits["train"] for file in example.media}
    unused = sorted(set(pages) - kinds)
    if unused:
        raise DataError(f"no training example of '{bench.data}' has an {' or '.join(unused)}; leave that encoder out")


def _digest(projector: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(projector.state_dict().items()):
        digest.update(name.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()
