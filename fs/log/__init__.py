"""Transactions: the only way to dirty metadata."""
