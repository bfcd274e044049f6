"""`Bundle`: the artifact on disk that every backend loads. Safe to load: no pickle, no code, every file's digest checked."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from ..api.request import Ensemble, Member, Space
from ..errors import BundleError, ConfigError, InvalidEnsembleError, NotFoundError
from .config import DecoderConfig

FORMAT = 3
MANIFEST = "motet.json"
MemberKind = Literal["base", "tail", "adapter"]
WEIGHTS = "model.safetensors"


def file_digest(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True, slots=True)
class Graphs:
    """File names of the ONNX graphs. Without tails the trunk holds all layers: one member, or a base and its adapters."""

    trunk: str
    tails: Mapping[str, str]  # member → graph
    head: str


@dataclass(frozen=True, slots=True)
class Bundle:
    """A loaded manifest. `split_layer` is the first layer that members have of their own."""

    path: Path
    name: str
    config: DecoderConfig
    members: tuple[str, ...]
    kinds: tuple[MemberKind, ...]  # of each member: the base itself, layers of its own, or a low-rank update
    default_ensemble: Ensemble
    quantisation: Mapping[str, Any]
    split_layer: int
    graphs: Graphs
    eos_token_ids: tuple[int, ...]
    manifest: Mapping[str, Any]

    @property
    def adapters(self) -> tuple[int, ...]:
        """Indices of the members that are low-rank updates of the base."""
        return tuple(index for index, kind in enumerate(self.kinds) if kind == "adapter")

    @classmethod
    def load(cls, path: Path | str, *, verify: bool = True) -> Bundle:
        """Read and check a bundle directory.

        Raises `NotFoundError` if there is none, `BundleError` if a file is missing, does not have the digest that the
        manifest records, or the manifest is of an unknown version or inconsistent.
        """
        path = Path(path)
        if not (path / MANIFEST).is_file():
            raise NotFoundError(f"no bundle at '{path}' ({MANIFEST} is missing); `motet export` makes one")
        try:
            manifest = json.loads((path / MANIFEST).read_bytes())
        except ValueError as error:
            raise BundleError(f"'{path / MANIFEST}' is not JSON ({error}); export the bundle again") from error
        if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
            found = manifest.get("format") if isinstance(manifest, dict) else type(manifest).__name__
            raise BundleError(f"'{path}' has bundle format {found!r}; this version reads format {FORMAT}")
        try:
            bundle = cls._from_manifest(path, manifest)
        except (KeyError, TypeError, ValueError, ConfigError, InvalidEnsembleError) as error:
            raise BundleError(f"'{path / MANIFEST}' is inconsistent: {error!r}; export the bundle again") from error
        if verify:
            bundle._verify(manifest["files"])
        return bundle

    @classmethod
    def _from_manifest(cls, path: Path, manifest: dict[str, Any]) -> Bundle:
        members = tuple(member["name"] for member in manifest["members"])
        kinds = tuple(member["kind"] for member in manifest["members"])
        if not set(kinds) <= set(get_args(MemberKind)):
            raise BundleError(f"a member's kind is one of {get_args(MemberKind)}, the manifest has {kinds}")
        mix = tuple(Member(member["name"], float(member["mix"])) for member in manifest["members"])
        graphs = Graphs(manifest["graphs"]["trunk"], manifest["graphs"]["tails"], manifest["graphs"]["head"])
        whole = {name for name, kind in zip(members, kinds, strict=True) if kind != "adapter"}
        if graphs.tails and set(graphs.tails) != whole:
            raise BundleError(f"the tails {sorted(graphs.tails)} are not the members {sorted(whole)}")
        listed = set(manifest["files"])
        needed = {WEIGHTS, graphs.trunk, graphs.head, *graphs.tails.values(), "tokenizer.json"}
        if not needed <= listed or any(Path(name).name != name for name in listed):
            raise BundleError(
                f"the manifest must list the plain file names {sorted(needed)}, it lists {sorted(listed)}"
            )
        return cls(
            path=path,
            name=manifest["name"],
            config=DecoderConfig.from_dict(manifest["config"]),
            members=members,
            kinds=kinds,
            default_ensemble=Ensemble(tuple(m for m in mix if m.mix != 0), Space(manifest["space"])),
            quantisation=manifest["quantisation"],
            split_layer=manifest["split_layer"],
            graphs=graphs,
            eos_token_ids=tuple(manifest["eos_token_ids"]),
            manifest=manifest,
        )

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
