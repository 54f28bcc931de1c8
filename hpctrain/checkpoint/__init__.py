"""Checkpoints: pieces of state, written to a temporary name and committed by one rename."""
