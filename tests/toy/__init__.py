"""A model family of a package of its own, as a stranger writes it: nothing in rlhf_t2i knows of it."""
