"""Block devices: where an image's bytes are. `base.Device` says what one can do."""
