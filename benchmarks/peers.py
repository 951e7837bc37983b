"""Compare fastlstm with NumPy, PyTorch, ONNX Runtime and OpenVINO, as far as they are installed.

``python benchmarks/peers.py --json peers.json --readme README.md --chart peers.png`` runs every standard size with one
thread and with all, and puts the tables into the README; ``--from-json peers.json`` does so without running anything.
"""

from __future__ import annotations

import argparse
import shlex
import sys

from fastlstm.bench import command


def main() -> int:
    parser = argparse.ArgumentParser(prog="peers.py", description=__doc__.partition("\n")[0])
    command.add_options(parser)
    try:
        return command.run(parser.parse_args(), shlex.join(["python", "benchmarks/peers.py", *sys.argv[1:]]))
    except (OSError, ValueError) as error:
        print(f"peers.py: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
