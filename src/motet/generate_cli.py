"""`motet generate` and `motet chat`: one prompt or a conversation in the terminal."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .options import (
    DEFAULT_ADDRESS,
    KEY_VARIABLE,
    STRUCTURE_OPTIONS,
    Address,
    Bundle,
    Ca,
    Cert,
    CertKey,
    Defaults,
    MixOption,
    SpaceOption,
    Tls,
    read_ensemble,
    read_sampling,
    sampling_options,
    take_structure,
    with_options,
    with_signature,
)
from .runtime.api.config import EngineConfig
from .runtime.api.output import Completion, Output, join
from .runtime.api.prompt import Message, Prompt
from .runtime.api.request import Ensemble, Member
from .runtime.client.media import read_file
from .runtime.errors import ConfigError, ContextLengthError, DataError, InvalidRequestError, MotetError
from .runtime.text.documents import read_document

if TYPE_CHECKING:
    from .runtime.client.client import Client

_ALPHA = 0.5
_Part = dict[str, Any]
# What begins a line of `chat` → type of the part, in words
_MEDIA = {"/image ": ("image", "image"), "/audio ": ("audio", "sound")}


def mount(app: typer.Typer) -> None:
    """Add the commands to the app."""
    app.command()(generate)
    app.command()(chat)


@with_signature
@with_options(sampling_options(max_tokens=256, temperature=0.7, top_p=0.95) | STRUCTURE_OPTIONS)
def generate(
    typed: typer.Context,
    prompt: Annotated[str, typer.Argument(help="What to ask; sent as a chat message unless --raw.")],
    trust: EngineConfig,
    bundle: Bundle = None,
    address: Address = None,
    tls: Tls = False,
    ca: Ca = None,
    cert: Cert = None,
    cert_key: CertKey = None,
    defaults: Defaults = "motet",
    mix: MixOption = None,
    space: SpaceOption = None,
    context: Annotated[Path | None, typer.Option(help="A document to answer from (context-aware decoding).")] = None,
    alpha: Annotated[
        float | None,
        typer.Option(help=f"How much --context counts: (1 + α) with it − α without; default: {_ALPHA}."),
    ] = None,
    member: Annotated[str | None, typer.Option(help="The member that reads --context; default: the first.")] = None,
    image: Annotated[
        list[Path] | None, typer.Option(help="A picture to ask about, a file. May be given several times.")
    ] = None,
    audio: Annotated[
        list[Path] | None, typer.Option(help="A sound to ask about, a file. May be given several times.")
    ] = None,
    raw: Annotated[bool, typer.Option(help="Send the text as it is, without the chat template.")] = False,
    request_id: Annotated[str, typer.Option(help="An id for the request; default: the server makes one.")] = "",
    time_limit_s: Annotated[
        float | None, typer.Option(help="Seconds after which the answer ends with what it has.")
    ] = None,
    return_member_logprobs: Annotated[
        bool, typer.Option("--member-logprobs", help="Report each member's log-probabilities of the tokens.")
    ] = False,
    return_confidence: Annotated[
        bool,
        typer.Option(
            "--confidence", help="Report how sure the answer and its tokens are; the bundle must be calibrated."
        ),
    ] = False,
    abstain_below: Annotated[
        float | None, typer.Option(help="Mark an answer with less confidence (0 to 1) as abstained.")
    ] = None,
    drafts: Annotated[
        int, typer.Option(help="Answer with the one of so many drafts that agrees most with the others; 0: no drafts.")
    ] = 0,
    priority: Annotated[
        int, typer.Option(help="Of the caller's waiting requests the one with the lowest number goes first.")
    ] = 0,
    cache_salt: Annotated[str, typer.Option(help="Share cached prefixes only with requests that have it too.")] = "",
    as_json: Annotated[
        bool, typer.Option("--json", help="Print each choice, when all have ended, as one line of JSON.")
    ] = False,
    **values: Any,
) -> None:
    """Generate from one prompt and stream it to the terminal."""
    structure = take_structure(values)
    sampling = read_sampling(values, typed, defaults, bundle, trust)
    ensemble = read_ensemble(mix, space)
    if context is None and (alpha is not None or member is not None):
        raise ConfigError("--alpha and --member are for context-aware decoding; give --context too")
    if context is not None and ensemble is not None:
        raise ConfigError("--context makes an ensemble of its own; give --member instead of --mix")
    if (image or audio) and raw:
        raise ConfigError("--raw sends a text, and --image and --audio are parts of a chat message; leave one out")
    given = [("image", "image", file) for file in image or ()] + [("audio", "sound", file) for file in audio or ()]
    media = [{"type": kind, kind: read_file(file, what)} for kind, what, file in given]
    document = read_document(context) if context is not None else ""
    with _client(bundle, trust, address, tls, ca, cert, cert_key) as client:
        views: Sequence[Prompt] = ()
        text = prompt
        if context is not None:
            alpha = _ALPHA if alpha is None else alpha
            name = member if member is not None else client.models()[0].members[0]
            ensemble = Ensemble((Member(name, 1 + alpha), Member(name, -alpha, view=1)))
            views = [_as_prompt(prompt, raw, media)]
            text = f"{document}\n\n{prompt}"
        deltas = client.generate(
            _as_prompt(text, raw, media),
            mix=ensemble,
            views=views,
            sampling=sampling,
            request_id=request_id,
            time_limit_s=time_limit_s,
            return_member_logprobs=return_member_logprobs,
            return_confidence=return_confidence,
            abstain_below=abstain_below,
            drafts=drafts,
            priority=priority,
            cache_salt=cache_salt,
            structure=structure,
        )
        if as_json:
            _print_json(deltas)
        else:
            _print(deltas)


@with_signature
@with_options(sampling_options(without=("n", "logprobs"), max_tokens=512, temperature=0.7, top_p=0.95))
def chat(
    typed: typer.Context,
    trust: EngineConfig,
    bundle: Bundle = None,
    address: Address = None,
    tls: Tls = False,
    ca: Ca = None,
    cert: Cert = None,
    cert_key: CertKey = None,
    defaults: Defaults = "motet",
    mix: MixOption = None,
    space: SpaceOption = None,
    system: Annotated[str | None, typer.Option(help="A system message.")] = None,
    **values: Any,
) -> None:
    """Chat in several turns. An empty line or the end of the input ends it. When the context is full, the oldest turns
    are left out; the system message stays. A line `/image FILE` or `/audio FILE` adds a
    picture or a sound to the next message."""
    sampling = read_sampling(values, typed, defaults, bundle, trust)
    ensemble = read_ensemble(mix, space)
    first = [{"role": "system", "content": system}] if system is not None else []
    turns: list[Message] = []  # user, assistant, user, …
    media: list[_Part] = []  # of the next message
    with _client(bundle, trust, address, tls, ca, cert, cert_key) as client:
        context = client.models()[0].max_model_len
        while (text := _read_line()).strip():
            command = next(filter(text.startswith, _MEDIA), None)
            if command is not None:
                _add_medium(media, *_MEDIA[command], Path(text.removeprefix(command).strip()))
                continue
            turns.append(_as_message(text, media))
            media = []
            try:
                dropped = _num_dropped(client, first, turns, context, sampling.max_tokens)
            except InvalidRequestError as error:
                if isinstance(turns[-1]["content"], str):
                    raise
                _note(f"{error}; this message was left out")  # a medium that the server does not take
                turns.pop()
                continue
            if dropped == len(turns):
                _note(f"this message does not fit the context of {context} tokens; send a shorter one")
                turns.pop()
                continue
            if dropped:
                _note(f"the context of {context} tokens is full: the oldest {dropped // 2} turn(s) were left out")
                del turns[:dropped]
            answer = _print(client.generate([*first, *turns], mix=ensemble, sampling=sampling))
            turns.append({"role": "assistant", "content": answer})


def _add_medium(media: list[_Part], kind: str, what: str, file: Path) -> None:
    """A file that cannot be read is said, and the chat goes on."""
    try:
        media.append({"type": kind, kind: read_file(file, what)})
    except MotetError as error:
        _note(str(error))
        return
    _note(f"{what} {sum(kind in part for part in media)} of the next message")


def _read_line() -> str:
    """A line of standard input; "" at its end. Raises `DataError` if it is not UTF-8."""
    try:
        line = input("> ").removeprefix("\ufeff")
        line.encode()
    except EOFError:
        return ""
    except UnicodeError:
        raise DataError("standard input is not UTF-8; convert it to UTF-8") from None
    return line


def _num_dropped(
    client: Client, first: Sequence[Message], turns: Sequence[Message], context: int, max_tokens: int | None
) -> int:
    """How many of the oldest messages to leave out, a question and its answer at a time, so that the rest leaves room
    for an answer: `max_tokens`, and at most half of the context. The last message alone may leave less. All of them,
    if not even that fits."""
    room = min(max_tokens or context, context // 2)
    for dropped in range(0, len(turns), 2):
        is_last = dropped == len(turns) - 1
        try:
            num_tokens = len(client.tokenize([*first, *turns[dropped:]]))
        except ContextLengthError:
            continue
        if num_tokens + (1 if is_last else room) <= context:
            return dropped
    return len(turns)


def _note(text: str) -> None:
    print(f"[{text}]", file=sys.stderr)


def _as_prompt(text: str, raw: bool, media: Sequence[_Part]) -> Prompt:
    return text if raw else [_as_message(text, media)]


def _as_message(text: str, media: Sequence[_Part]) -> Message:
    """Of the user. Media come before the text."""
    if not media:
        return {"role": "user", "content": text}
    return {"role": "user", "content": [*media, {"type": "text", "text": text}]}


@contextmanager
def _client(
    bundle: Path | None,
    trust: EngineConfig,
    address: str | None,
    tls: bool,
    ca: Path | None,
    cert: Path | None,
    cert_key: Path | None,
) -> Iterator[Client]:
    """A client of the server at `address`, or, with `bundle`, of a server in this process on a free port."""
    from .runtime.client.client import Client
    from .runtime.client.connection import Connection
    from .runtime.serve.local import local_server

    if bundle is not None and address is not None:
        raise ConfigError("--bundle serves in this process and --address is another server; give one of them")
    if bundle is not None and (tls or ca or cert or cert_key):
        raise ConfigError("--bundle serves in this process, without TLS; leave --tls, --ca, --cert and --cert-key out")
    if bundle is None and (trust.verify_key or trust.verify_ca):
        raise ConfigError("--verify-key and --verify-ca ask for a bundle's signature; give --bundle too")
    if bundle is None:
        key = os.environ.get(KEY_VARIABLE) or None
        connection = Connection(address if address is not None else DEFAULT_ADDRESS, key, tls, ca, cert, cert_key)
        with Client(connection) as client:
            yield client
    else:
        with local_server(bundle, trust) as local_address, Client(local_address) as client:
            yield client


def _print(deltas: Iterator[Output]) -> str:
    """Print the first choice as it streams, and each other choice when the one before it has ended. Figures go to
    stderr. Returns the text of the first choice."""
    started = time.monotonic()
    answers: dict[int, Completion] = {}
    shown = 0  # the choice that is being printed
    for delta in deltas:
        if delta.choice == shown:
            print(delta.text, end="", flush=True)
        join(answers, delta)
        while shown in answers and answers[shown].finish_reason is not None:
            _print_figures(answers[shown], time.monotonic() - started)
            shown += 1
            if shown in answers:
                print(answers[shown].text, end="", flush=True)
    return answers[0].text if answers else ""


def _print_json(deltas: Iterator[Output]) -> None:
    answers: dict[int, Completion] = {}
    for delta in deltas:
        join(answers, delta)
    for _, answer in sorted(answers.items()):
        fields = dataclasses.asdict(answer)
        del fields["error"]  # it was raised
        for name in ("prompt_logprobs", "logprobs"):  # JSON has no infinity
            fields[name] = [max(value, -9999.0) for value in fields[name]]
        fields["candidate_logprobs"] = [[max(value, -9999.0) for value in one] for one in fields["candidate_logprobs"]]
        print(json.dumps(fields, ensure_ascii=False))


def _print_figures(answer: Completion, seconds: float) -> None:
    """Print one line per token if log-probabilities or confidences were requested, and one line for the answer."""
    print()
    for index, logprob in enumerate(answer.prompt_logprobs, 1):
        best = " ".join(f"{other}:{value:.3f}" for other, value in answer.prompt_top_logprobs[index - 1])
        print(f"prompt token {index}, logprob {logprob:.3f}" + (f", best {best}" if best else ""), file=sys.stderr)
    for index, token_id in enumerate(answer.token_ids):
        line = f"token {token_id}"
        if answer.logprobs:
            best = " ".join(f"{other}:{value:.3f}" for other, value in answer.top_logprobs[index])
            line += f", logprob {answer.logprobs[index]:.3f}" + (f", best {best}" if best else "")
        if answer.member_logprobs:
            line += ", members " + " ".join(f"{value:.3f}" for value in answer.member_logprobs[index])
        if answer.candidate_logprobs:
            line += ", of the ids " + " ".join(f"{value:.3f}" for value in answer.candidate_logprobs[index])
        if answer.confidence:
            line += f", confidence {answer.confidence[index]:.3f}, disagreement {answer.disagreement[index]:.3f}"
        if answer.logprobs or answer.member_logprobs or answer.candidate_logprobs or answer.confidence:
            print(line, file=sys.stderr)
    count = len(answer.token_ids)
    name = f"{answer.request_id}: " if answer.request_id else ""
    rate = f"{count / seconds:.0f} tok/s"
    sure = "" if answer.answer_confidence is None else f", confidence {answer.answer_confidence:.3f}"
    if answer.abstained:
        sure += " (abstained)"
    print(f"[{name}{answer.finish_reason}, {count} tokens, {rate}, seed {answer.seed}{sure}]", file=sys.stderr)
