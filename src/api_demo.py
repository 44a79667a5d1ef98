"""`python src/api_demo.py …` is `burnish api …`, from any folder, installed or not."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from burnish.cli import main

if __name__ == "__main__":
    sys.exit(main(["api", *sys.argv[1:]]))
