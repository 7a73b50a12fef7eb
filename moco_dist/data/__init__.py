"""Who loads what, how it is cropped, and how it is coloured."""
