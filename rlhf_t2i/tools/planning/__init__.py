"""``rlhf-t2i plan``: parameters, memory, traffic, seconds and disk of a recipe, and what makes it fit a device.

The networks are counted by running them on the meta device. ``devices`` and this package import no torch.
"""
