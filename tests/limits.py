"""How long a test waits for a process of its own before it counts as hanging."""

HANG_S = 1500
"""Far more than any takes: a busy machine needed 185 s to start roles that start in 12 elsewhere."""
