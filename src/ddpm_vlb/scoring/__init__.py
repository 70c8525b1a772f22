"""A checkpoint and its images, scored on any number of processes."""

import ddpm_vlb.runtime  # noqa: F401  (it says what to install)
