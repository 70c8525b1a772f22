"""Find the best few steps: `accelerate launch examples/optimize_timesteps.py` is `ddpm-vlb optimize-timesteps`."""

from ddpm_vlb.commands.optimize_timesteps import main

if __name__ == "__main__":
    main()
