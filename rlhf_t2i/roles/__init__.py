"""What each role does in its process: learner, generator, assistant, reference, reward. No Ray, no DeepSpeed."""
