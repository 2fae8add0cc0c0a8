"""``rlhf-t2i eval``: images with fixed seeds, scored, with intervals; stops and goes on at any moment."""
