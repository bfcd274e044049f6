"""JSON of the schemas of the JSON Schema Test Suite: `python -m fuzz.structures`, in `tests/`; `make structures`.

The suite comes with the source distribution of the `jsonschema` package, which pip fetches. A schema that is refused (as
`InvalidRequestError`) is counted; one that is taken must give valid JSON, greedy and sampled, from an ensemble of four members.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

from helpers.models import write_tokenizer
from helpers.structures import check_schema, structure_engine
from motet.runtime.errors import InvalidRequestError
from motet.runtime.text.tokenizer import Tokenizer

DRAFTS = ("draft2020-12", "draft7")


def schemas(version: str, folder: Path) -> list[dict]:
    """The different schemas of the drafts, in the suite's order."""
    command = [
        "pip",
        "download",
        "-q",
        "--no-deps",
        "--no-binary",
        ":all:",
        "-d",
        str(folder),
        f"jsonschema=={version}",
    ]
    subprocess.run([sys.executable, "-m", *command], check=True)
    found: dict[str, dict] = {}
    with tarfile.open(next(folder.glob("jsonschema-*.tar.gz"))) as archive:
        for member in sorted(archive.getmembers(), key=lambda member: member.name):
            parts = Path(member.name).parts
            if (
                len(parts) == 5
                and parts[1:3] == ("json", "tests")
                and parts[3] in DRAFTS
                and member.name.endswith(".json")
            ):
                file = archive.extractfile(member)
                assert file is not None
                for group in json.load(file):
                    if isinstance(group["schema"], dict):
                        found.setdefault(json.dumps(group["schema"], sort_keys=True), group["schema"])
    return list(found.values())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=int, default=200, help="schemas that must be taken; 0: all there are")
    parser.add_argument("--version", default="4.26.0", help="of jsonschema")
    options = parser.parse_args()
    taken = cut = 0
    slowest = 0.0
    refused: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        write_tokenizer(path)
        tokenizer = Tokenizer.from_dir(path)
        with structure_engine(tokenizer) as engine:
            for schema in schemas(options.version, path):
                began = time.monotonic()
                try:
                    cut += check_schema(engine, schema)
                    taken += 1
                except InvalidRequestError as error:
                    slowest = max(slowest, time.monotonic() - began)
                    reason = str(error).partition("cannot be used: ")[2] or str(error)
                    refused[reason[:60]] = refused.get(reason[:60], 0) + 1
                if taken == options.count:
                    break
    for reason, count in sorted(refused.items(), key=lambda item: -item[1])[:12]:
        print(f"{count:4d} refused: {reason}")
    print(
        f"{taken} schemas taken, {2 * taken} answers, {cut} of them cut by max_tokens, no wrong one; "
        f"{sum(refused.values())} schemas refused, the slowest in {slowest:.2f} s"
    )
    assert taken >= options.count


if __name__ == "__main__":
    main()
