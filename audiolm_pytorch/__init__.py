"""Audio as discrete tokens, language models over them, and back: AudioLM (arXiv 2209.03143) in small modules."""

import warnings
from importlib.metadata import PackageNotFoundError, version

__all__: list[str] = []


def _warn_of_namesake() -> None:
    """Another project's distribution installs a package of this name into the same folder; files would mix."""
    try:
        found = version("audiolm-pytorch")
    except PackageNotFoundError:
        return
    warnings.warn(
        f"the distribution audiolm-pytorch {found} of another project is installed under the same import name; "
        "run: pip uninstall audiolm-pytorch && pip install --force-reinstall --no-deps musiclm-pytorch",
        stacklevel=3,
    )


_warn_of_namesake()
