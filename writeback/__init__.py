"""Cleaning: dirty accounting, the flusher and I/O completion. Knows mappings, never XFS."""
