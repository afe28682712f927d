"""Crashes: a seeded load whose writes are recorded, and what recovery makes of any moment of it."""
