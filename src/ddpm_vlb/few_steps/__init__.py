"""The chains of few steps that are compared, stored and reported."""

import ddpm_vlb.runtime  # noqa: F401  (it says what to install)
