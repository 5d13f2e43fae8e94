"""`python -m firebox` is the `firebox` command."""

from firebox.cli import main

if __name__ == "__main__":
    main()
