"""What is wrong with a machine, a config or a run: one line a finding, with what to do."""
