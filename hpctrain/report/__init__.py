"""What the user sees: the run folder that others read, progress, pictures."""
