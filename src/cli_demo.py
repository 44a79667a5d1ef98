"""`python src/cli_demo.py …` is `burnish chat …`, from any folder, installed or not."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from burnish.cli import main

if __name__ == "__main__":
    sys.exit(main(["chat", *sys.argv[1:]]))
