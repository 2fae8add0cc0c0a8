"""The mathematics: losses, schedules, the few-step student, randomness and prompt order, as pure functions."""
