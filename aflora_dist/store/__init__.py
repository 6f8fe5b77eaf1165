"""Where a run is kept: its directory, its checkpoints, and going on from them."""
