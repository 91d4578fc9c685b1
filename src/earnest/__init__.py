"""ERNIE 4.5, in earnest."""
