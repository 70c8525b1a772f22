"""Upload a finished run: `python examples/publish.py runs/digits --hub_model_id me/digits` is `ddpm-vlb publish`."""

from ddpm_vlb.commands.publish import main

if __name__ == "__main__":
    main()
