"""`aflora train`: what a command line asks for, set up, refused where it cannot be, and trained."""
