"""Transactions, the only way to dirty metadata; the log, as far as it is read."""
