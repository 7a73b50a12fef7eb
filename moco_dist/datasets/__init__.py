"""Getting a data set, checking it and packing it."""
