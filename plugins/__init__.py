"""The rewards and divergences shipped with rlhf-t2i; they register through the same entry points as anyone's."""
