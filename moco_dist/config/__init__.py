"""The schema of every setting, and how a file and flags become one config."""
