"""The filesystem: devices, the XFS format, transactions, caches, the FUSE front, the mount."""
