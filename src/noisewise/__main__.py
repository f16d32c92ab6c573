"""`python -m noisewise`: the command line, where its script is not on the path."""

from noisewise.cli import main

__all__: list[str] = []

if __name__ == "__main__":
    main()
