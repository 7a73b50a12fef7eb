"""Start the program on one machine or on many: torchrun, Slurm, Kubernetes. Imports no more of it than its config."""
