"""``python -m coreskip``: the command line."""

from coreskip.cli import main

if __name__ == "__main__":
    main()
