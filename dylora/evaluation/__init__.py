"""What a trained mixture can do: losses, skills, plots, generation, a checkpoint's description."""
