"""Training engines: DeepSpeed ZeRO for distributed runs, plain PyTorch for one process, and their checkpoints."""
