"""Where a model's parameters live, and which buckets of gradients still need exchanging."""
