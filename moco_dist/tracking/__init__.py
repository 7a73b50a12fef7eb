"""A run's record in MLflow, kept by rank 0: settings, metrics, files, and evaluations as child runs.

Everything is first a line of a journal beside the run (outbox.py), and from there goes to the server on a background
thread (remote.py). So a step never waits for a server, and a server that is gone loses nothing: what it has missed is
delivered when it is back, by the run itself or by `moco-dist sync`, in order, and once.
"""

from moco_dist.tracking.server import client_of, page_of, run_page, saved_run, ui_command
from moco_dist.tracking.tracker import Tracker, sync

__all__ = ["Tracker", "client_of", "page_of", "run_page", "saved_run", "sync", "ui_command"]
