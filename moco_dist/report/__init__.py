"""What a person looks at after, or during, a run: pages, comparisons, the registry."""
