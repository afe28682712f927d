"""What is kept in the arena: buffers, inodes, names, folios."""
