"""`python -m tiered`."""

from tiered.cli import main

if __name__ == "__main__":
    main()
