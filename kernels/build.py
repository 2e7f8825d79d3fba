"""Compile the C++ kernel now, and not at its first use: `python -m kernels.build`."""

import argparse
import sys
from collections.abc import Sequence

from . import output
from .cpp_backend import library


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    return argparse.ArgumentParser(description=__doc__).parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    parse(arguments)
    loaded = library()
    if isinstance(loaded, str):
        print(f"error: {loaded}; CPUs run the torch backend, which is slower", file=sys.stderr)
        return 1
    print(loaded._name)
    return 0


if __name__ == "__main__":
    sys.exit(output.run(main))
