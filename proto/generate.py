"""Generate the Python stubs: `python -m motet.proto.generate OUT`. The root of the protos is this folder."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent


def generate(out: Path) -> None:
    """Write the stubs of every .proto below this folder into `out`, as modules of one package. `protoc` would have them
    import each other as `motet.v1`, which is the name of the protos' package and of no package of Python."""
    with tempfile.TemporaryDirectory() as folder:
        outs = [f"--{kind}_out={folder}" for kind in ("python", "pyi", "grpc_python")]
        names = [path.relative_to(ROOT).as_posix() for path in sorted(ROOT.rglob("*.proto"))]
        subprocess.run([sys.executable, "-m", "grpc_tools.protoc", f"-I{ROOT}", *outs, *names], check=True)
        for path in (path for place in ("motet/v1", "inference") for path in Path(folder, place).iterdir()):
            text = path.read_text()
            for package in ("motet.v1", "inference"):
                text = text.replace(f"from {package} import", "from . import")
            (out / path.name).write_text(text)


if __name__ == "__main__":
    generate(Path(sys.argv[1]))
