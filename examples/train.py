"""Train a likelihood-based DDPM: `accelerate launch examples/train.py --max_train_steps 1000` is `ddpm-vlb train`."""

from ddpm_vlb.commands.train import main

if __name__ == "__main__":
    main()
