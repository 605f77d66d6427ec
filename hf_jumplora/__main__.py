"""`python -m hf_jumplora`: the command `hf-jumplora`."""

import sys

from .cli import main


if __name__ == "__main__":
    sys.exit(main())
