"""Start the program on one machine or on many."""
