"""What train.py stands on: sizes, processes, batches, latent cache, checkpoints, samples, the small VAE's loss."""
