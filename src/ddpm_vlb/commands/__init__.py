"""The commands: each module is a parser and a `main(argv)`, launched by `ddpm-vlb NAME` or `accelerate launch -m`."""

try:
    import ddpm_vlb.runtime  # noqa: F401
except ModuleNotFoundError as error:
    raise SystemExit(str(error)) from error
