"""The commands: each module is a parser and a `main(argv)`, launched by `ddpm-vlb NAME` or `accelerate launch -m`."""

import ddpm_vlb.runtime  # noqa: F401  (it says what to install)
