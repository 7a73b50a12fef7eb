"""The world as a value, and the collectives."""
