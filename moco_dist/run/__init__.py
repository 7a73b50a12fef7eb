"""A run's folder: what lies in it, who may write it, and how a run goes on."""
