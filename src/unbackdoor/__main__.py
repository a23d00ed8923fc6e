"""``python -m unbackdoor`` is the command line."""

from unbackdoor.cli import main

if __name__ == "__main__":
    main()
