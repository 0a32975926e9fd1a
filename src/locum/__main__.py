"""`python -m locum` is the command `locum`."""

from .cli import main

if __name__ == "__main__":
    main()
