"""Memory: the arena and everything that hands it out or gets it back. Knows no file."""
