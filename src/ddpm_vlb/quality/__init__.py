"""How good samples are: features, distances between sets of them, their report."""

import ddpm_vlb.runtime  # noqa: F401  (it says what to install)
