"""What train.py stands on: checkpoints, the cache of latents, the small VAE's loss."""
