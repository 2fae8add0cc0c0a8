"""The training run: Algorithm 1, and around it checkpoints, metrics, monitors and the run folder."""
