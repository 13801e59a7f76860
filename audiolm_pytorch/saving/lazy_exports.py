"""Names of a package that are imported on first use, so that a program loads only the modules that it needs."""

import ast
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

__all__ = ["import_exports", "lazy_exports"]

_packages: dict[str, dict[str, str]] = {}  # package -> exported name -> module that defines it


def lazy_exports(package: str) -> dict[str, Any]:
    """Return the functions `__getattr__` and `__dir__` and the list `__all__` of a package, by name.

    The exports are the imports below `if TYPE_CHECKING:` in `__init__.py`, which type checkers and editors also read.
    """
    module = sys.modules[package]
    blocks = [node for node in ast.parse(Path(str(module.__file__)).read_text()).body if isinstance(node, ast.If)]
    imports = [node for block in blocks for node in block.body if isinstance(node, ast.ImportFrom)]
    exports = _packages[package] = {alias.name: str(node.module) for node in imports for alias in node.names}

    def import_name(name: str) -> Any:
        if name in exports:
            value = getattr(import_module(exports[name]), name)
        elif name.isidentifier() and name[0] != "_" and find_spec(f"{package}.{name}") is not None:  # a submodule
            value = import_module(f"{package}.{name}")
        else:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        setattr(module, name, value)
        return value

    # Type checkers do not see these names. They would accept any name of a module that has a `__getattr__`.
    return {
        "__getattr__": import_name,
        "__dir__": lambda: sorted({*vars(module), *exports}),
        "__all__": sorted(exports),
    }


def import_exports(name: str | None = None) -> None:
    """Import, from every package that is already imported, the lazy export `name`; None imports all lazy exports."""
    for package, exports in list(_packages.items()):
        for export in exports if name is None else exports.keys() & {name}:
            getattr(sys.modules[package], export)
