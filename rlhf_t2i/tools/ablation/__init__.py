"""``rlhf-t2i ablate``: a base recipe, named rows of changes to it, one table."""
