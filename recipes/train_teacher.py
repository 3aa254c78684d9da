"""`python -m hf_kdtl.commands.train_teacher`, as a script."""

import sys

from hf_kdtl.commands.common.arguments import run
from hf_kdtl.commands.train_teacher import main

if __name__ == "__main__":
    sys.exit(run(main))
