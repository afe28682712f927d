"""What the kernel talks to: FUSE operations and mount options."""
