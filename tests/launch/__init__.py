"""Launchers on real parts: torchrun, Slurm and pods on several hosts of one machine."""
