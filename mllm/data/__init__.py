"""Read data sets as items, and stream training examples."""
