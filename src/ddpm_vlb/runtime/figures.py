"""Pictures go to files: matplotlib's figures without pyplot, whose backend is the environment's."""

import contextlib
import os
import sys
from pathlib import Path

if "matplotlib" not in sys.modules:
    # A notebook leaves its backend in the environment of what it starts, where `import matplotlib` fails on it.
    _backend = os.environ.pop("MPLBACKEND", None)
    import matplotlib

    if _backend is not None:
        os.environ["MPLBACKEND"] = _backend
        with contextlib.suppress(ValueError):
            matplotlib.rcParams["backend"] = _backend

from matplotlib.figure import Figure


def save(figure: Figure, path: Path, right: float = 1.0, top: float = 1.0) -> None:
    """Lay a figure out and write it.

    Args:
        figure: whose axes take all of it but what is left free.
        path: the PNG file to write.
        right: where the axes end, as a fraction of the width.
        top: and of the height.
    """
    figure.tight_layout(rect=(0, 0, right, top))
    figure.savefig(path, dpi=120)
