"""Score a checkpoint: `accelerate launch examples/evaluate.py --model runs/digits` is `ddpm-vlb evaluate`."""

from ddpm_vlb.commands.evaluate import main

if __name__ == "__main__":
    main()
