"""What a run learned: features of the frozen backbone, nearest neighbours in them, a linear classifier on them."""
