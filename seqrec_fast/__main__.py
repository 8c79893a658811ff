"""``python -m seqrec_fast`` is ``seqrec-fast``."""

from seqrec_fast.cli import main

if __name__ == "__main__":
    main()
