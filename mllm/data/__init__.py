"""From files to items: readers, the embedded data sets, and batches."""
