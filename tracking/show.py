"""Show the records in a MongoDB with Omniboard: `python -m tracking.show`, which `make omniboard` calls."""

import argparse
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from errors import UserError, exits_cleanly
from tracking.addresses import VARIABLE, connect, find_address

ROOT = Path(__file__).resolve().parent.parent
SERVER = ROOT / "tracking" / "omniboard"


@exits_cleanly
def main(argv: Sequence[str] | None = None) -> int:
    """Become Omniboard, for the MongoDB that run_experiment.py would record in; UserError where there is none."""
    parser = argparse.ArgumentParser(prog="tracking.show", description="Start Omniboard on this machine, from npm.")
    parser.add_argument("--mongo_uri", metavar="URI", help=f"default: {VARIABLE}, then .env")
    parser.add_argument("--port", type=int, default=8081, help="default 8081; the next free one if it is taken")
    args = parser.parse_args(argv)
    address = find_address(args.mongo_uri, os.environ, ROOT / ".env")
    if address is None:
        raise UserError(f"no MongoDB to show is given; set {VARIABLE}, or call make omniboard MONGO_URI=mongodb://...")
    node = shutil.which("node")
    if node is None or not (SERVER / "node_modules").is_dir():
        raise UserError("Omniboard is not installed; install Node.js 18 or newer with npm and call make omniboard")
    client, _ = connect(address)
    client.close()
    os.environ.update(MONGO_URI=address.uri, PORT=str(args.port))
    os.execv(node, [node, str(SERVER / "start.js")])


if __name__ == "__main__":
    sys.exit(main())
