"""Measurements anyone can run; what was run is in results/."""
