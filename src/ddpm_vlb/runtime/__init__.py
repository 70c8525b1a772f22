"""What every command needs: processes, signals, image data, pictures and uploads; stands on the `train` extra."""

import importlib.util


def require(**packages: str) -> None:
    """Make sure that packages of the `train` extra are there.

    Args:
        packages: what pip calls them, by their modules.

    Raises:
        ModuleNotFoundError: some are not; it says what to install.
    """
    missing = [name for module, name in packages.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise ModuleNotFoundError(
            f"This part of ddpm-vlb needs {', '.join(missing)}, which the package without its `train` extra does not "
            'bring: pip install "ddpm-vlb[train]"'
        )


require(accelerate="accelerate", datasets="datasets", matplotlib="matplotlib", sklearn="scikit-learn")
