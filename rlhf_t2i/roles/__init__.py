"""What each role does on its device; nothing here knows Ray."""
