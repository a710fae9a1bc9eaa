"""Encoder weights of other projects: their files, their names, and how they fit into MPMA."""
