"""One module a command, imported on demand: `main(words)` parses, builds, calls and returns an exit status."""
