"""`python -m deepspec` is `deepspec`."""

from deepspec.cli import main

if __name__ == "__main__":
    main()
