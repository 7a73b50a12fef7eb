"""MoCo v2 (Momentum Contrast v2, arXiv 2003.04297) on one machine or on many."""

__version__ = "0.1.0"
