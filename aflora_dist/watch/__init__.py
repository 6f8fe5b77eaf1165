"""What is noted while a run goes on, and how it is asked to stop.

For others: `log.TrainingLog`, `traces.TraceRecorder` and its windows, `memory.MemoryHistory`, `rates.flops_per_token`,
`stopping.StopRequest`, `trackers.check_trackers`; the rest is for these.
"""
