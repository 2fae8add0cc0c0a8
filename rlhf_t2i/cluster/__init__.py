"""Ray: worker actors, placement groups and the handles through which roles call each other."""
