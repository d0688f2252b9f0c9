"""Methods that reduce the number of parameters of a tree."""
