"""The endurance run: a small arena, loads that want far more, and each policy's answer to them."""
