"""Adaptive Cross-Layer Attention for image restoration.

A wheel installs kernels/ as `acla.kernels`, train.py, search.py and evaluate.py in `acla.scripts`.
In a checkout they lie beside this folder and have these names too; there `import kernels` gives the
same modules as `import acla.kernels`: the operator can be registered only once."""

import sys
from importlib.abc import Loader
from importlib.machinery import ModuleSpec, PathFinder
from os.path import realpath
from pathlib import Path
from types import ModuleType

BESIDE = [str(Path(__file__).parents[1])]


class Twin(Loader):
    """Gives the module that is loaded under another name."""

    def __init__(self, module: ModuleType):
        self.module = module

    def exec_module(self, module: ModuleType) -> None:
        sys.modules[module.__name__] = self.module


class CheckoutFinder:
    """Finds what lies beside this package, and one module for both names of a kernel module."""

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if name == "acla.scripts":
            spec = ModuleSpec(name, None, is_package=True)
            spec.submodule_search_locations = BESIDE
            return spec
        short = name.removeprefix("acla.")
        if short.split(".")[0] != "kernels":
            return None
        spec = PathFinder.find_spec(name, BESIDE if name == "acla.kernels" else path)
        twin = sys.modules.get(f"acla.{name}" if name == short else short)
        file = getattr(twin, "__file__", None)
        if spec and spec.origin and file and realpath(spec.origin) == realpath(file):
            spec.loader = Twin(twin)
        return spec


if not Path(__file__).with_name("kernels").is_dir():
    sys.meta_path.insert(0, CheckoutFinder)
