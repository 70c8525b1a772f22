"""What a training run is made of: what is trained, the loop's parts, checkpoints, which images a step takes."""

import ddpm_vlb.runtime  # noqa: F401  (it says what to install)
