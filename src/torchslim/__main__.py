"""`python -m torchslim`, for `torchrun -m torchslim` above all."""

from torchslim.cli import main

if __name__ == "__main__":
    main()
