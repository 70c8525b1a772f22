"""Measure a checkpoint's samples: `accelerate launch examples/sample_quality.py` is `ddpm-vlb sample-quality`."""

from ddpm_vlb.commands.sample_quality import main

if __name__ == "__main__":
    main()
