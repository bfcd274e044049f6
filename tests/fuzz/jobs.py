"""A job of 500 records whose server is killed ten times, and one of 100,000: `python -m fuzz.jobs`, in `tests/`; `make jobs`."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from helpers.batch_jobs import killed_and_undisturbed, memory_of_a_submission
from helpers.models import write_model
from motet.export.bundle_writer import export_bundle


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--records", type=int, default=500)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--large", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        bundle = export_bundle(write_model(folder / "model", "llama"), folder / "tiny", graphs=False)
        killed, undisturbed = killed_and_undisturbed(bundle, folder, args.records, args.kills, args.seed)
        assert killed == undisturbed and len(killed) == args.records
        print(f"{args.kills} kills: {len(killed)} answers, each once, equal to those of an undisturbed server")
        small, large = (memory_of_a_submission(bundle, folder / str(n), n) for n in (1000, args.large))
        print(f"the server held {small:.0f} MiB with 1,000 records, {large:.0f} MiB with {args.large:,}")


if __name__ == "__main__":
    main()
