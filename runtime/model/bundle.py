"""`Bundle`: the artifact on disk that every backend loads. It is safe to load: no pickle, no code, and digests of all
files."""

from __future__ import annotations

import hashlib
import json
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from ..api.confidence import Calibration
from ..api.model_info import MemberOrigin
from ..api.request import Ensemble, Member, Space
from ..errors import BundleError, ConfigError, InvalidEnsembleError, NotFoundError
from .config import DecoderConfig
from .decoder_graph import DecoderGraph, GraphConfig
from .encoders import KINDS, Encoder
from .files import file_digest
from .members import MemberKind

FORMAT = 6
MANIFEST = "motet.json"
WEIGHTS = "model.safetensors"


@dataclass(frozen=True, slots=True)
class Graphs:
    """File names of the ONNX graphs. If there is one member, `trunk` holds all layers and `tails` is empty."""

    trunk: str
    tails: Mapping[str, str]  # member → graph
    head: str


@dataclass(frozen=True, slots=True)
class Bundle:
    """A loaded manifest. `split_layer` is the first layer of the members' tails, the number of layers if there is one
    member. A tail is layers of its own, or those of the base, perhaps with low-rank updates. `graphs` is None if the
    bundle was exported without them; the cpu and torch backends do not need them. A bundle of an ONNX decoder that another
    program exported has a `decoder_graph`, one member, and no weights of Motet's."""

    path: Path
    name: str
    sizes: DecoderConfig | GraphConfig
    members: tuple[str, ...]
    kinds: tuple[MemberKind, ...]  # of each member
    default_ensemble: Ensemble
    split_layer: int
    graphs: Graphs | None
    decoder_graph: DecoderGraph | None
    eos_token_ids: tuple[int, ...]
    manifest: Mapping[str, Any]
    encoders: Mapping[str, Encoder] = field(default_factory=dict)  # by medium
    encoder_files: Mapping[str, tuple[str, str]] = field(default_factory=dict)  # the graph of each, and its weights
    calibration: Calibration | None = None  # of confidences, for the default ensemble; `motet calibrate` fits it

    @property
    def config(self) -> DecoderConfig:
        """The model's layers. Raises `ConfigError` for a bundle of a decoder graph, which alone knows them."""
        if isinstance(self.sizes, GraphConfig):
            raise ConfigError(
                f"'{self.name}' holds an ONNX graph that another program exported, and no weights that this could use; serve "
                "it with the onnx backend, or export the model's directory of safetensors"
            )
        return self.sizes

    @property
    def quantisation(self) -> Mapping[str, Any]:
        """Bits and sizes of groups. Raises `ConfigError` for a bundle of a decoder graph (see `config`)."""
        assert self.config  # it says why there is none
        return dict(self.manifest["quantisation"])

    @property
    def tails(self) -> tuple[str | None, ...]:
        """Whose layers and final norm each tail has: the base's (None) if a member runs them, and those of each member
        with layers of its own. Empty if there is one member."""
        own = [name for name, kind in zip(self.members, self.kinds, strict=True) if kind.own_layers]
        shared = [None] if len(own) < len(self.members) else []
        return (*shared, *own) if self.has_tails else ()

    @property
    def tail_of(self) -> tuple[int, ...]:
        """[members] index of each member's tail; empty if there is one member."""
        tails = self.tails
        return tuple(tails.index(name if name in tails else None) for name in self.members) if tails else ()

    @property
    def digest(self) -> str:
        """SHA-256 over what an answer depends on: the digests of all files, the configuration, the ends of answers, the members'
        coefficients and temperatures, the space in which they are mixed, and the calibration of confidences."""
        content = {key: self.manifest[key] for key in ("files", "config", "split_layer", "eos_token_ids", "space")}
        content["mix"] = [
            (member["name"], float(member["mix"]), float(member.get("temperature", 1.0)))
            for member in self.manifest["members"]
        ]
        content["calibration"] = self.manifest.get("calibration")
        if self.encoders:
            content["encoders"] = self.manifest["encoders"]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    @property
    def origins(self) -> tuple[MemberOrigin, ...]:
        """[members] what the members' training runs wrote of themselves."""
        return tuple(
            _origin(str(kind), member) for kind, member in zip(self.kinds, self.manifest["members"], strict=True)
        )

    @property
    def has_tails(self) -> bool:
        """Whether there are several members: each runs the layers from `split_layer` on (perhaps none) and a final norm,
        after a shared trunk."""
        return len(self.members) > 1

    @property
    def model_files(self) -> tuple[str, ...]:
        """File names of the weights and the graphs."""
        return (*self._decoder_files, *(file for files in self.encoder_files.values() for file in files))

    @property
    def _decoder_files(self) -> tuple[str, ...]:
        graphs, decoder = self.graphs, self.decoder_graph
        if decoder is not None:
            return (decoder.file, *decoder.data)
        return (WEIGHTS,) if graphs is None else (WEIGHTS, graphs.trunk, graphs.head, *graphs.tails.values())

    @classmethod
    def load(cls, path: Path | str, *, verify: bool = True) -> Bundle:
        """Read and check a bundle directory.

        Raises `NotFoundError` if there is none, `BundleError` if the manifest has an unknown version or is
        inconsistent, or, with `verify`, if a file is missing or its digest is not the manifest's.
        """
        path = Path(path)
        if not (path / MANIFEST).is_file():
            raise NotFoundError(f"no bundle at '{path}' ({MANIFEST} is missing); `motet export` makes one")
        _check_own(path / MANIFEST)
        try:
            manifest = json.loads((path / MANIFEST).read_bytes())
        except (ValueError, RecursionError) as error:
            raise BundleError(f"'{path / MANIFEST}' is not JSON ({error}); export the bundle again") from error
        if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
            found = manifest.get("format") if isinstance(manifest, dict) else type(manifest).__name__
            raise BundleError(f"'{path}' has bundle format {found!r}; this version reads format {FORMAT}")
        try:
            bundle = cls._from_manifest(path, manifest)
        except (KeyError, TypeError, ValueError, ConfigError, InvalidEnsembleError) as error:
            raise BundleError(f"'{path / MANIFEST}' is inconsistent: {error!r}; export the bundle again") from error
        for name in manifest["files"]:
            _check_own(path / name)
        if verify:
            bundle._verify(manifest["files"])
        return bundle

    @classmethod
    def _from_manifest(cls, path: Path, manifest: dict[str, Any]) -> Bundle:
        members = tuple(member["name"] for member in manifest["members"])
        kinds = tuple(_kind(member["kind"]) for member in manifest["members"])
        mix = tuple(
            Member(member["name"], float(member["mix"]), temperature=float(member.get("temperature", 1.0)))
            for member in manifest["members"]
        )
        decoder_graph = _decoder_graph(manifest, members)
        made_here = decoder_graph is None
        config = (DecoderConfig if made_here else GraphConfig).from_dict(manifest["config"])
        split_layer = manifest["split_layer"] if len(members) > 1 else config.num_layers
        if not 0 <= split_layer <= config.num_layers:
            raise BundleError(f"split_layer must be in 0…{config.num_layers}, the manifest has {split_layer}")
        if made_here:
            dict(manifest["quantisation"])  # raises TypeError
        encoders, encoder_files = _encoders(manifest.get("encoders") or {})
        for medium, encoder in encoders.items():
            if encoder.token_id >= config.vocab_size:
                raise BundleError(
                    f"the placeholder of {medium} has the id {encoder.token_id}, the model {config.vocab_size} embeddings; "
                    "export the bundle again"
                )
        bundle = cls(
            path=path,
            name=manifest["name"],
            sizes=config,
            members=members,
            kinds=kinds,
            default_ensemble=Ensemble(tuple(m for m in mix if m.mix != 0), Space(manifest["space"])),
            split_layer=split_layer,
            graphs=_graphs(manifest, members) if made_here else None,
            decoder_graph=decoder_graph,
            eos_token_ids=tuple(manifest["eos_token_ids"]),
            manifest=manifest,
            encoders=encoders,
            encoder_files=encoder_files,
            calibration=_calibration(manifest.get("calibration")),
        )
        if not all(type(i) is int and 0 <= i < config.vocab_size for i in bundle.eos_token_ids):
            raise BundleError(
                f"eos_token_ids must be in 0…{config.vocab_size - 1}, the manifest has {bundle.eos_token_ids}"
            )
        listed, needed = set(manifest["files"]), {*bundle.model_files, "tokenizer.json"}
        if not needed <= listed or any(not name or Path(name).name != name for name in listed):
            raise BundleError(
                f"the manifest must list the plain file names {sorted(needed)}, it lists {sorted(listed)}"
            )
        return bundle

    def _verify(self, files: Mapping[str, str]) -> None:
        for name, digest in files.items():
            file = self.path / name
            if not file.is_file():
                raise BundleError(f"the bundle at '{self.path}' lacks '{name}'; copy or export it again")
            found = file_digest(file)
            if found != digest:
                raise BundleError(
                    f"'{file}' is damaged: its SHA-256 is {found[:12]}…, the manifest says {digest[:12]}…; "
                    "copy or export the bundle again"
                )


def _origin(kind: str, member: Mapping[str, Any]) -> MemberOrigin:
    """Raises `BundleError` if the provenance is no run's."""
    found = member.get("provenance") or {}
    try:
        data, privacy = found.get("data") or {}, found.get("privacy") or {}
        return MemberOrigin(
            kind=kind,
            method=str((found.get("hyper_parameters") or {}).get("method", "")),
            data=str(data.get("name", "")),
            trained_on=int(data.get("trained_on", 0)),
            epsilon=float(privacy["epsilon"]) if privacy else None,
            delta=float(privacy["delta"]) if privacy else None,
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise BundleError(f"the provenance of member '{member.get('name')}' is damaged: {error!r}") from None


def _check_own(file: Path) -> None:
    """Raises `BundleError` for a file that may change, or be read, outside of the bundle's directory."""
    try:
        status = file.lstat()
    except FileNotFoundError:
        return  # `_verify` says so
    if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
        raise BundleError(f"'{file}' is a link or no plain file; a bundle has files of its own: copy it (cp -RL)")


def _calibration(values: Mapping[str, Any] | None) -> Calibration | None:
    return None if values is None else Calibration(*(float(values[f.name]) for f in fields(Calibration)))


def _kind(name: str) -> MemberKind:
    kinds = {str(kind): kind for kind in MemberKind}
    if name not in kinds:
        raise BundleError(f"a member's kind is one of {[*kinds]}, the manifest has {name!r}")
    return kinds[name]


def _encoders(entries: Mapping[str, Any]) -> tuple[dict[str, Encoder], dict[str, tuple[str, str]]]:
    """The encoders by medium, and their files."""
    if not isinstance(entries, Mapping):
        raise BundleError(f"the manifest's encoders are an object, by medium; it has {type(entries).__name__}")
    unknown = sorted(set(entries) - set(KINDS))
    if unknown:
        raise BundleError(f"the manifest has encoders of {unknown}; known are {[*KINDS]}")
    encoders, files = {}, {}
    for medium, values in entries.items():
        entry = dict(values)
        files[medium] = (entry.pop("graph"), entry.pop("data"))
        encoders[medium] = KINDS[medium].from_dict(entry)
    return encoders, files


def _decoder_graph(manifest: Mapping[str, Any], members: tuple[str, ...]) -> DecoderGraph | None:
    if manifest["graphs"] is None or "whole" not in manifest["graphs"]:
        return None
    if len(members) != 1:
        raise BundleError(f"a decoder graph of another program is one member, the manifest has {list(members)}")
    return DecoderGraph.from_dict(manifest["graphs"])


def _graphs(manifest: Mapping[str, Any], members: tuple[str, ...]) -> Graphs | None:
    if manifest["graphs"] is None:
        return None
    graphs = Graphs(manifest["graphs"]["trunk"], manifest["graphs"]["tails"], manifest["graphs"]["head"])
    expected = set(members) if len(members) > 1 else set()
    if set(graphs.tails) != expected:
        raise BundleError(f"the graphs' tails are {sorted(graphs.tails)}, the members with one {sorted(expected)}")
    return graphs
