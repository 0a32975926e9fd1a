"""`locum bench` on the bundled model after LightMoE at half of its experts' parameters, beside the original.

    python -m benchmarks.speed.reference [--batch 1 8] [--rounds 5] [--threads 2] [--picture FILE] [--out FILE]

Prints one line for every model, implementation, number of prompts and phase, as `locum bench` measures them.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import locum
from benchmarks.speed.timing import publish
from locum.bundled import MODEL, reference_data
from locum.demonstration import COMPRESSED, REMOVE


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--picture", type=Path, help="draw the results on this HTML page")
    parser.add_argument("--out", type=Path, help="append the results to this file")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        small = Path(folder) / "lightmoe"
        locum.compress(MODEL, data=reference_data(), tokens=16384, remove=REMOVE, out=small, **COMPRESSED["lightmoe"])
        how = {"batch_sizes": options.batch, "rounds": options.rounds, "threads": options.threads}
        result = locum.bench(small, against=MODEL, picture=options.picture, force=True, **how)
    settings = {key: result["settings"][key] for key in ("prompt", "new_tokens", "rounds")}
    memory = ("weights_bytes", "resident_bytes", "bytes_per_second", "operations_per_second")
    for row in result["rows"]:
        model = {key: result["models"][row["model"]][key] for key in memory}
        publish({"benchmark": "reference_speed", **row, **model, **settings}, options.threads, options.out)


if __name__ == "__main__":
    main()
