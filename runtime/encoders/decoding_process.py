"""The process that decodes files for `MediaDecoder`. A line of JSON with the settings comes in, by medium; then, for each file, a
line with its medium and size, and its bytes. Out go a line that it was taken, a line with the answer, and what it was decoded to
if that is wanted.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from .image_files import ImageFiles
from .sound_files import SoundFiles

MEMORY = 2 * 2**30  # of the process, address space, beside what it has when it is ready
_FILES: dict[str, Any] = {"image": ImageFiles, "audio": SoundFiles}


def _main() -> None:
    import resource
    import warnings

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    warnings.simplefilter("ignore")
    settings = json.loads(sys.stdin.buffer.readline())
    files = {medium: _FILES[medium](own) for medium, own in settings.items()}
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + MEMORY, held + MEMORY))
    out = sys.stdout.buffer
    out.write(b'"ready"\n')
    out.flush()
    for line in sys.stdin.buffer:
        asked = json.loads(line)
        content = sys.stdin.buffer.read(asked["size"])
        out.write(b'"taken"\n')  # from here on, an end is the file's fault
        out.flush()
        answer, values = files[asked["medium"]].decoded(content, asked["is_look"])
        out.write(json.dumps(answer).encode() + b"\n")
        if values is not None:
            out.write(values.data)
        out.flush()


if __name__ == "__main__":
    _main()
