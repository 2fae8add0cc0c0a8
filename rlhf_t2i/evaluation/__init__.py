"""Drawing images, scoring them and comparing the scores; used by training, ``rlhf-t2i eval`` and the ablation."""
