"""What every command needs: processes, signals, image data, pictures and uploads; stands on the `train` extra."""

import importlib.util

# A module of each package that the wings import as they load, and what pip calls it.
_NEEDED = {
    "accelerate": "accelerate",
    "datasets": "datasets",
    "matplotlib": "matplotlib",
    "scipy": "scipy",
    "sklearn": "scikit-learn",
    "transformers": "transformers",
}
_missing = [package for module, package in _NEEDED.items() if importlib.util.find_spec(module) is None]
if _missing:
    raise ModuleNotFoundError(
        f"ddpm-vlb's commands need {', '.join(_missing)}, which the package without its `train` extra does not bring: "
        'pip install "ddpm-vlb[train]"'
    )
