"""Where roles live and how they are called: one process, or Ray actors in groups."""
