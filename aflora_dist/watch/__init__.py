"""What is noted while a run goes on: log, telemetry, traces, and the wish to stop."""
