"""`python src/train_bash.py …` is `burnish train …`, from any folder, installed or not."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from burnish.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
