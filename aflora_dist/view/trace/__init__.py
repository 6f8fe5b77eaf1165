"""`aflora trace RUN`: what a run's profiler traces say about steps, ranges, communication and ranks; without torch."""
