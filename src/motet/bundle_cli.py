"""`motet sign`, `export-onnx`, `inspect`: what is done with a bundle that was made."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .export.flavours import Flavour, WeightForm
from .options import with_signature
from .runtime.api.config import EngineConfig
from .runtime.errors import ConfigError
from .tables import table


def mount(app: typer.Typer) -> None:
    """Add the commands to the program."""
    for command in (sign, export_onnx, inspect):
        app.command()(command)


def sign(
    bundle: Annotated[Path, typer.Argument(help="Directory of the bundle.")],
    private_key: Annotated[Path, typer.Option(help="Private key of an elliptic curve, PEM.")],
    certificate: Annotated[
        Path | None, typer.Option(help="The key's certificate, PEM; it goes into the signature.")
    ] = None,
    chain: Annotated[
        list[Path] | None,
        typer.Option(help="Certificates of the authorities above it, PEM. May be given several times."),
    ] = None,
) -> None:
    """Sign all files of a bundle, in OpenSSF's format: `model.sig` in its directory. `--verify-key` or `--verify-ca` of the
    commands that read bundles asks for it."""
    from .runtime.model.signature import sign as run

    print(run(bundle, private_key, certificate, chain or []))


@with_signature
def export_onnx(
    bundle: Annotated[Path, typer.Argument(help="The bundle.")],
    out: Annotated[Path, typer.Argument(help="Directory of the ONNX decoder.")],
    trust: EngineConfig,
    member: Annotated[str | None, typer.Option(help="The member that is written; default: the only one.")] = None,
    flavour: Annotated[
        Flavour,
        typer.Option(
            help="portable: standard operators, for any ONNX runtime, in Optimum's layout; genai: ONNX Runtime's own operators, "
            "for onnxruntime-genai."
        ),
    ] = Flavour.PORTABLE,
    opset: Annotated[
        int | None, typer.Option(help="Version of the standard operators, 17 to 23. With portable only; default: 21.")
    ] = None,
    weights: Annotated[
        WeightForm | None,
        typer.Option(help="In the bundle's bits (stored), or widened. With portable only; default: stored."),
    ] = None,
) -> None:
    """Write one member of a bundle as an ONNX decoder for other runtimes."""
    from .export.onnx_directory import write_onnx
    from .runtime.engine.open import load_bundle

    print(write_onnx(load_bundle(bundle, trust), out, member, flavour=flavour, opset=opset, form=weights))


@with_signature
def inspect(
    path: Annotated[
        str,
        typer.Argument(
            help="A bundle, a pulled model's name, a model directory, or an ONNX decoder graph: its file or directory."
        ),
    ],
    trust: EngineConfig,
    json: Annotated[bool, typer.Option("--json", help="A line of JSON for each weight.")] = False,
) -> None:
    """What a bundle, a model or an ONNX graph holds, weight by weight: shape, bits, bytes, expected KL, digest."""
    from dataclasses import asdict
    from json import dumps

    from rich.console import Console

    from .export.decoder_graph import find_graph
    from .export.inspection import inspect as inspected
    from .runtime.checkpoints.store import resolve_model
    from .runtime.engine.open import check_signature
    from .runtime.model.bundle import MANIFEST

    if (Path(path) / MANIFEST).is_file():
        check_signature(Path(path), trust)
    elif trust.verify_key or trust.verify_ca:
        raise ConfigError(f"'{path}' is no bundle, and only bundles are signed; leave out --verify-key and --verify-ca")
    as_it_is = (Path(path) / MANIFEST).is_file() or find_graph(Path(path)) is not None
    weights = list(inspected(Path(path) if as_it_is else resolve_model(path)))
    if json:
        for weight in weights:
            print(dumps(asdict(weight)))
        return
    rows = [
        [
            weight.name,
            " x ".join(map(str, weight.shape)),
            str(weight.bits),
            str(weight.group_size or "–"),
            f"{weight.num_bytes:,}",
            "–" if weight.expected_kl is None else f"{weight.expected_kl:.2g}",
            weight.digest[:12],
        ]
        for weight in weights
    ]
    total = sum(weight.num_bytes for weight in weights)
    title = f"{path}: {len(weights)} weights, {total / 1e6:.1f} MB"
    Console().print(table(title, ["weight", "shape", "bits", "group", "bytes", "expected KL", "SHA-256"], rows))
