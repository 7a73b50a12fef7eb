"""Tar shards and packed files in object stores and on web servers, read by ranges of bytes."""
