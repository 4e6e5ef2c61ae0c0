"""`python -m hgrn2_bench`."""

from hgrn2_bench.cli import main

if __name__ == "__main__":
    main()
