"""From HDF5 files to micro-batches: index, read, load; the order of samples is arithmetic."""
