"""Programs that a user may copy and change: `ddpm-vlb cp`."""

import ddpm_vlb.runtime  # noqa: F401  (it says what to install)
