"""Measure hpctrain against its peers and the physical limit, in turn, in one run."""
