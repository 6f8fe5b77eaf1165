"""What a run will train, hold and move, computed beforehand: without weights, without a GPU, without an engine."""
