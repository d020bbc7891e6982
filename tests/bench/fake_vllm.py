"""Stands for the executable of vLLM: `--version`, and `bench serve`, which writes a result as the real one does."""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main() -> None:
    if sys.argv[1:] == ["--version"]:
        print("INFO something\n9.9.9")
        return
    assert sys.argv[1:3] == ["bench", "serve"], sys.argv
    options = dict(zip(sys.argv[3:], sys.argv[4:], strict=False))
    requests, tokens = int(options["--num-prompts"]), int(options["--random-output-len"])
    result = {
        "completed": requests,
        "duration": 2.0,
        "output_lens": [tokens] * requests,
        "input_lens": [int(options["--random-input-len"])] * requests,
        "ttfts": [0.1] * requests,
        "itls": [[0.01] * (tokens - 1)] * requests,
        "latencies": [0.1 + 0.01 * (tokens - 1)] * requests,
        "errors": [""] * requests,
        "seen": sys.argv,
    }
    (Path(options["--result-dir"]) / options["--result-filename"]).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
